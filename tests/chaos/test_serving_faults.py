"""Replicas and proxies are killed under load: who asked gets an answer all the same.

Real `tandem serve` with two replicas behind HAProxy, open-loop load. Every request is counted; what became of
those that weren't answered with 200 is printed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from bench.open_loop import Planned, Sent, drive, http_post
from servables import publish_mlp
from serving_process import ServiceProcess, processes, serving, wait_until

from cluster.registry import Registry
from cluster.storage import open_store

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]

RATE = 150
SECONDS = 12.0
STRIKE_AT_S = 4.0
WITHIN_S = 8.0
HAPROXY_BACK_S = 24.0
ROW = json.dumps({"instances": [[0.0] * 64]}).encode()
REQUEST = http_post("/v1/models/digits:predict", ROW, "content-type: application/json")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("faults")
    store = open_store(str(folder / "store"))
    publish_mlp(store, "digits", favourite=1)
    publish_mlp(store, "digits", favourite=2, alias=None)
    replicas = {"min": 2, "max": 2, "cpus": 0.5}
    model = {"model": "digits@live", "replicas": replicas, "slo_ms": 8000}
    with serving({"store": store.uri, "models": [model], "follow_every_s": 0.2}, folder) as running:
        yield running


def under_load(service: ServiceProcess, strike: Callable[[], None], seconds: float = SECONDS) -> list[Sent]:
    """Load for a while, with a fault in the middle."""
    plan = [Planned(number / RATE, WITHIN_S) for number in range(int(RATE * seconds))]
    timer = threading.Timer(STRIKE_AT_S, strike)
    timer.start()
    try:
        return drive(int(service.url.rpartition(":")[2]), plan, lambda planned, due_s: REQUEST)
    finally:
        timer.join(60)


def report(capsys: pytest.CaptureFixture[str], what: str, sent: list[Sent]) -> Counter[int]:
    statuses = Counter(one.status for one in sent)
    slowest = max((one.latency_s for one in sent if one.status == 200), default=0.0)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{what}: {len(sent)} requests, by status {dict(statuses)}, slowest {slowest:.2f} s\n"
        )
    return statuses


def await_two(service: ServiceProcess) -> None:
    wait_until(lambda: len(processes(service, "ServeReplica:tandem:model")) == 2, within_s=60, every_s=0.5)
    time.sleep(2)  # until HAProxy, too, has both


def test_a_killed_replica_costs_no_request(
    service: ServiceProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    def strike() -> None:
        processes(service, "ServeReplica:tandem:model")[0].send_signal(signal.SIGKILL)

    await_two(service)
    statuses = report(capsys, "a replica killed", under_load(service, strike))
    assert set(statuses) == {200}
    await_two(service)


def test_a_swap_and_a_replica_killed_at_once(
    service: ServiceProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    def strike() -> None:
        Registry(open_store(str(_store(service)))).promote("digits", "live", 2, why="chaos")
        processes(service, "ServeReplica:tandem:model")[0].send_signal(signal.SIGKILL)

    await_two(service)
    statuses = report(capsys, "a swap, and a replica killed", under_load(service, strike))
    assert set(statuses) == {200}
    await_two(service)


def test_a_killed_haproxy_comes_back(service: ServiceProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """What was open is lost with it; from when it is back, everything is answered."""

    def strike() -> None:
        for process in processes(service, "haproxy"):
            process.send_signal(signal.SIGKILL)

    await_two(service)
    sent = under_load(service, strike, HAPROXY_BACK_S)
    statuses = report(capsys, "HAProxy killed", sent)
    assert set(statuses) <= {0, 200, 503}, "never that the model is unknown"
    failed = [one.planned.at_s for one in sent if one.status != 200]
    with capsys.disabled():
        sys.stdout.write(f"without an answer from {min(failed):.1f} s to {max(failed):.1f} s\n")
    assert max(failed) < HAPROXY_BACK_S - 1, "it never came back"


def test_a_killed_controller_is_not_noticed(
    service: ServiceProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    def strike() -> None:
        for process in processes(service, "ServeController"):
            process.send_signal(signal.SIGKILL)

    await_two(service)
    statuses = report(capsys, "the controller killed", under_load(service, strike))
    assert set(statuses) == {200}


def _store(service: ServiceProcess) -> str:
    """Where the service reads: named in the environment of nobody, so taken from its file."""
    command = psutil.Process(service.process.pid).cmdline()
    file = next(part for part in command if part.endswith("service.yaml"))
    found: str = json.loads(Path(os.fspath(file)).read_text())["store"]
    return found
