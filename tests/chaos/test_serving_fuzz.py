"""Thousands of hostile requests against a real service, over HTTP through HAProxy.

`TANDEM_FUZZ_SEED` and `TANDEM_FUZZ_ATTACKS` choose which and how many. After every round a good request to
each model must be answered as before; at the end the same processes must live, no larger than they were.
"""

from __future__ import annotations

import os
import random
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from hostile import ANSWER_WITHIN_S, Attack, Target, complaints, good, strike
from hostile_mix import attacks
from servables import MLP, PICTURE, TABLE, mlp_graph, picture_graph, publish, table_graph
from serving_process import ServiceProcess, processes, serving

from cluster.keys import Keys
from cluster.storage import open_store

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

SEED = int(os.environ.get("TANDEM_FUZZ_SEED", "1"))
ATTACKS = int(os.environ.get("TANDEM_FUZZ_ATTACKS", "12000"))
ROUND = 500
AT_ONCE = 12
GROWTH_MIB = 40
"""What a process may grow by between the first round and the last."""

ROW = {"age": 20.0, "city": "Paris"}
TABLE_INPUTS = [
    {"name": "age", "shape": [1], "datatype": "FP32", "data": [20.0]},
    {"name": "city", "shape": [1], "datatype": "BYTES", "data": ["Paris"]},
]
PIXELS = {"name": "image", "shape": [1, 8, 8, 1], "datatype": "UINT8", "data": [7] * 64}
ZEROS = {"name": "x", "shape": [1, 64], "datatype": "FP32", "data": [0.0] * 64}
TARGETS = (
    Target("digits", {"inputs": [ZEROS]}, {"instances": [[0.0] * 64]}),
    Target("table", {"inputs": TABLE_INPUTS}, {"instances": [ROW]}),
    Target("picture", {"inputs": [PIXELS]}, {"instances": [[[[7]] * 8] * 8]}),
)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> str:
    return Keys(open_store(str(_store(tmp_path_factory)))).create("attacker").text


@pytest.fixture(scope="module")
def service(key: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    store = open_store(str(_store(tmp_path_factory)))
    publish(store, "digits", mlp_graph(1), MLP)
    publish(store, "table", table_graph(), TABLE)
    publish(store, "picture", picture_graph(), PICTURE)
    one = {"min": 1, "max": 1, "cpus": 0.1}
    models = [
        {"model": f"{name}@live", "replicas": one | more, "max_body_bytes": 150_000, "slo_ms": 10_000}
        for name, more in (("digits", {"min": 2, "max": 2}), ("table", {}), ("picture", {}))
    ]
    file = {"store": store.uri, "models": models, "keys": "required"}
    with serving(file, tmp_path_factory.mktemp("service")) as running:
        yield running


def test_no_attack_is_answered_with_500_or_fells_anything(
    service: ServiceProcess, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = int(service.url.rpartition(":")[2])
    before = [strike(port, Attack("good", (good(target, key),))).raw for target in TARGETS]
    endless = attacks(random.Random(SEED), TARGETS, key)
    found: list[str] = []
    statuses: Counter[int] = Counter()
    left_open: list[tuple[str, list[int]]] = []
    sizes = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in range(0, ATTACKS, ROUND):
            batch = list(islice(endless, ROUND))
            for attack, seen in zip(batch, pool.map(partial(strike, port), batch), strict=True):
                found += complaints(attack, seen)
                statuses.update(seen.statuses)
                left_open += [(attack.what, seen.statuses)] if not seen.ended else []
            after = [strike(port, Attack("good", (good(target, key),))).raw for target in TARGETS]
            assert [_body(raw) for raw in after] == [_body(raw) for raw in before]
            sizes.append(_sizes_mib(service))
    with capsys.disabled():
        sys.stdout.write(f"\n{ATTACKS} attacks, answers {dict(sorted(statuses.items()))}\n")
        sys.stdout.write(f"answered, and open {ANSWER_WITHIN_S:.0f} s later: {left_open}\n")
        sys.stdout.write("MiB by process, at the end of each quarter:\n")
        for quarter in (1, 2, 3, 4):
            sys.stdout.write(f"  {sizes[len(sizes) * quarter // 4 - 1]}\n")
    assert not found, f"{len(found)} complaints:\n" + "\n".join(found[:30])
    assert sizes[0].keys() == sizes[-1].keys(), "a process ended, or began"
    assert all(sizes[-1][pid] < sizes[0][pid] + GROWTH_MIB for pid in sizes[0])


def _store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.getbasetemp() / "fuzzed-store"
    found.mkdir(exist_ok=True)
    return found


def _sizes_mib(service: ServiceProcess) -> dict[int, int]:
    """Of replicas and HAProxy: by process, the memory that is resident."""
    watched = processes(service, "ServeReplica") + processes(service, "haproxy")
    return {process.pid: process.memory_info().rss // 2**20 for process in watched}


def _body(raw: bytes) -> bytes:
    return raw.partition(b"\r\n\r\n")[2]
