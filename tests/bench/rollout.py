"""New versions under load, over real HTTP: what a swap, a canary and a bad version do to requests.

`tandem serve` through HAProxy, two replicas, open-loop load at 70% of the capacity found first (replicas,
HAProxy and the sender share the cores). Requests are timed from when they were to be sent.

    swap      10,000 requests with a swap beside 10,000 without one: failures, p99; and how long after an
              alias was moved the first answer of the new version came, and the last one of the old
    canary    10,000 requests with a tenth for the candidate: its share
    rollback  a candidate that fails on real requests though it loads, and one that is slow, each at 1%: how
              soon it is abandoned, how many requests it was given, what callers saw

    python -m tests.bench.rollout [--only swap,canary,rollback] [--pairs 5] [--requests 10000] [--out FILE]
"""

from __future__ import annotations

import http.client
import itertools
import json
import re
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.names import ModelRef
from cluster.registry import Registry
from cluster.storage import Store, open_store
from cluster.trial import Rules
from cluster.trials import abandon, begin
from tests.bench.asked import asked, finished
from tests.bench.machine import distributions, machine_facts, use_cores
from tests.bench.open_loop import Planned, Render, Sent, drive, http_post
from tests.bench.pairs import Comparison, Measure, Report, in_turn
from tests.servables import GATHER, MLP, gather_graph, publish, slow_graph
from tests.serving_process import ServiceProcess, serving

CORES = 2
WITHIN_S = 2.0
LOAD = 0.7
CALIBRATE_S = 3.0
FIRST_RATE = 100.0
FASTER = 1.2
KEPT = 0.99
KEPT_WITHIN_S = 0.1
POLL_S = 0.02
CANARY_PERCENT = 10.0
ROLLBACK_S = 15.0
ROLLBACK_AIM_S = 10.0

MODEL = "model"
FRAGILE = "fragile"
SIZE, LAYERS = 512, 60
SLOW_LAYERS = 300
_VERSION = re.compile(rb"x-model-version: (\d+)", re.IGNORECASE)
_FAILED = re.compile(r"of (\d+) requests failed")


def infer(model: str, name: str, datatype: str, shape: Sequence[int], data: Sequence[float]) -> bytes:
    """A whole request."""
    tensor = {"name": name, "datatype": datatype, "shape": shape, "data": data}
    body = json.dumps({"inputs": [tensor]}).encode()
    return http_post(f"/v2/models/{model}/infer", body, "content-type: application/json")


ASK_MODEL = infer(MODEL, "x", "FP32", [1, 64], [0.1] * 64)
ASK_FRAGILE = infer(FRAGILE, "index", "INT64", [1], [3])


def always(request: bytes) -> Render:
    """Every request the same."""
    return lambda planned, due_s: request


def evenly(rate: float, requests: int) -> list[Planned]:
    """Requests one after the other, `rate` a second."""
    return [Planned(number / rate, WITHIN_S) for number in range(requests)]


def answers_by_version(sent: Sequence[Sent]) -> Counter[int]:
    """How many answers each version gave."""
    found = (_VERSION.search(one.head) for one in sent if one.status == 200)
    return Counter(int(match.group(1)) for match in found if match)


class Watcher(threading.Thread):
    """Asks the model all the time, and moves its alias now and then: when was which version seen?"""

    def __init__(self, registry: Registry, port: int, seconds: float, moves: int) -> None:
        super().__init__(daemon=True)
        self._registry = registry
        self._port = port
        self._seconds = seconds
        self._moves = moves
        self.first_new_s: list[float] = []
        self.last_old_s: list[float] = []

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        head, _, body = ASK_MODEL.partition(b"\r\n\r\n")
        path = head.split()[1].decode()
        began_s = time.monotonic()
        dues_s = iter([self._seconds * (n + 0.5) / self._moves for n in range(self._moves)])
        due_s = next(dues_s, None)
        moved_s, awaited, first_s, last_s = 0.0, None, 0.0, 0.0
        while (passed_s := time.monotonic() - began_s) < self._seconds + WITHIN_S:
            if due_s is not None and passed_s > due_s:
                self._note(moved_s, first_s, last_s)
                awaited = other_version(self._registry)
                self._registry.promote(MODEL, "live", awaited, why="bench")
                moved_s, first_s, last_s = time.monotonic(), 0.0, 0.0
                due_s = next(dues_s, None)
            connection.request("POST", path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            if awaited is not None:
                now_s = time.monotonic()
                if answer.headers["x-model-version"] == str(awaited):
                    first_s = first_s or now_s
                else:
                    last_s = now_s
            time.sleep(POLL_S)
        self._note(moved_s, first_s, last_s)
        connection.close()

    def _note(self, moved_s: float, first_s: float, last_s: float) -> None:
        if moved_s:
            self.first_new_s.append(first_s - moved_s if first_s else float("inf"))
            self.last_old_s.append(max(0.0, last_s - moved_s))


def other_version(registry: Registry) -> int:
    """Of the two good versions, the one that isn't in service."""
    return 3 - registry.resolve(ModelRef(MODEL, "live")).version


class Questions:
    """Each question is a method; what it finds goes into the report."""

    def __init__(
        self, report: Report, store: Store, service: ServiceProcess, pairs: int, requests: int
    ) -> None:
        self._report = report
        self._store = store
        self._registry = Registry(store)
        self._port = int(service.url.rpartition(":")[2])
        self._pairs = pairs
        self._requests = requests
        self._rate = LOAD * self._capacity()

    def swap(self) -> None:
        failed = Counter[int]()
        first_new_s: list[float] = []
        last_old_s: list[float] = []

        def p99_s(swaps: int) -> float:
            watcher = Watcher(self._registry, self._port, self._requests / self._rate, swaps)
            watcher.start()
            sent = drive(self._port, evenly(self._rate, self._requests), always(ASK_MODEL))
            watcher.join()
            first_new_s.extend(watcher.first_new_s)
            last_old_s.extend(watcher.last_old_s)
            failed[swaps] += sum(one.status != 200 for one in sent)
            return sorted(one.latency_s for one in sent)[int(0.99 * len(sent))]

        found = in_turn(lambda: p99_s(1), lambda: p99_s(0), self._pairs)
        self._report.comparisons.append(
            Comparison("p99 latency, s", "a swap", "no swap", tuple(found), at_most=1.2)
        )
        self._note(
            f"requests of {self._pairs * self._requests} that failed, with a swap", failed[1], at_most=0
        )
        self._note(f"requests of {self._pairs * self._requests} that failed, without", failed[0])
        self._note("alias moved to first answer of the new version, s", *first_new_s, at_most=2)
        self._note("alias moved to last answer of the old version, s", *last_old_s)

    def canary(self) -> None:
        rules = Rules(hold_s=3600, then="wait", latency_ratio=1000, error_margin=1)
        shares = []
        for _ in range(self._pairs):
            candidate = other_version(self._registry)
            self._try(MODEL, candidate, CANARY_PERCENT, rules)
            self._wait_for(candidate)
            sent = drive(self._port, evenly(self._rate, self._requests), always(ASK_MODEL))
            shares.append(100 * answers_by_version(sent)[candidate] / len(sent))
            abandon(self._registry, MODEL, "live", why="measured")
        self._note(f"share of a {CANARY_PERCENT:g}% canary, %", *shares)
        self._note("the same, off by points", *(abs(share - CANARY_PERCENT) for share in shares), at_most=1)

    def rollback(self) -> None:
        rules = Rules(hold_s=3600)
        for model, request in ((FRAGILE, ASK_FRAGILE), (MODEL, ASK_MODEL)):
            bad = 2 if model == FRAGILE else 3
            what = "fails" if model == FRAGILE else "is slow"
            took_s, given, failed = [], [], 0
            for _ in range(self._pairs):
                began = time.time_ns()
                self._try(model, bad, 1.0, rules)
                sent = drive(self._port, evenly(self._rate, int(ROLLBACK_S * self._rate)), always(request))
                failed += sum(one.status != 200 for one in sent)
                end = self._registry.newest(model)
                assert end is not None
                if end.action != "abandon":
                    took_s.append(float("inf"))
                    given.append(float("inf"))
                    abandon(self._registry, model, "live", why="measured")
                    continue
                took_s.append(end.at.timestamp() - began / 1e9)
                # Those that failed were answered by the version in service; only the log counts them.
                counted = _FAILED.search(end.why)
                exposed = int(counted.group(1)) if counted else answers_by_version(sent)[bad]
                given.append(100 * exposed / (took_s[-1] * self._rate))
            self._note(f"a version that {what}: begun to abandoned, s", *took_s, at_most=ROLLBACK_AIM_S)
            self._note(f"a version that {what}: requests it was given until then, %", *given, at_most=1)
            self._note(f"a version that {what}: failures that callers saw", failed, at_most=0)

    def _try(self, model: str, candidate: int, percent: float, rules: Rules) -> None:
        begin(
            self._registry, model, "live", candidate, mode="canary", steps=[percent], rules=rules, why="bench"
        )

    def _wait_for(self, version: int) -> None:
        """Until both replicas have surely loaded it."""
        for _ in range(50):
            sent = drive(self._port, evenly(self._rate, int(self._rate)), always(ASK_MODEL))
            if answers_by_version(sent)[version] > 0.5 * len(sent) * CANARY_PERCENT / 100:
                return
        raise RuntimeError(f"version {version} was never given its share")

    def _capacity(self) -> float:
        """Requests a second that are answered within 0.1 s, but for one in a hundred; in steps of a fifth."""
        rate, requests = FIRST_RATE, always(ASK_MODEL)
        for rate in (FIRST_RATE * FASTER**step for step in itertools.count()):
            sent = drive(self._port, evenly(rate, int(rate * CALIBRATE_S)), requests)
            if sum(one.status == 200 and one.latency_s < KEPT_WITHIN_S for one in sent) < KEPT * len(sent):
                break
        found = rate / FASTER
        self._report.notes.append(f"capacity {found:.0f} requests/s; asked {LOAD * found:.0f}/s")
        return found

    def _note(self, figure: str, *values: float, at_most: float | None = None) -> None:
        self._report.measures.append(Measure(figure, tuple(map(float, values)), at_most))


def service_file(store: Store) -> dict[str, Any]:
    """Two models with two replicas each; three versions of the one, the third slow; two of the other."""
    for seed_of_bias in range(2):
        publish(store, MODEL, slow_graph(SIZE, LAYERS + seed_of_bias), MLP, alias=None)
    publish(store, MODEL, slow_graph(SIZE, SLOW_LAYERS), MLP, alias=None)
    Registry(store).promote(MODEL, "live", 1, why="bench")
    publish(store, FRAGILE, gather_graph(), GATHER)
    publish(store, FRAGILE, gather_graph(1), GATHER, alias=None)
    replicas = {"min": 2, "max": 2, "cpus": 0.25}
    models = [{"model": f"{name}@live", "replicas": replicas, "slo_ms": 1000} for name in (MODEL, FRAGILE)]
    return {"store": store.uri, "models": models}


def main() -> int:
    chosen = asked(
        __doc__,
        only=(str, "swap,canary,rollback", "questions, by commas"),
        requests=(int, 10_000, "of each measurement"),
    )
    use_cores(CORES)
    report = Report(
        "New versions under load",
        machine_facts(),
        {"ours": distributions("tandem-ray", "ray", "onnxruntime")},
    )
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        store = open_store(str(Path(name) / "store"))
        with serving(service_file(store), Path(name)) as service:
            questions = Questions(report, store, service, chosen.pairs, chosen.requests)
            for question in chosen.only.split(","):
                getattr(questions, question)()
    return finished(report, chosen)


if __name__ == "__main__":
    raise SystemExit(main())
