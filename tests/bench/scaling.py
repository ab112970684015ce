"""Scaling live, over real HTTP through HAProxy, beside Ray Serve's own policy and Knative's.

    zero     no replica runs and a request comes: seconds to its answer, beside Ray Serve; a small ONNX graph
    burst    no replica runs and 100 requests come within 0.1 s: how many aren't answered
    serve    a slice of a real trace, made fifty times as dense, on the sleeping device of
             `tests.bench.batching` within 300 ms: requests not answered in time, and replica-seconds, beside
             Ray Serve's default policy
    knative  the same beside Knative's rules

The peers of the last two run a plain FIFO batcher on the same device that drops what has expired
(`servers/serve_device.py`), one replica at least, as does Tandem. Each run starts its server anew: Serve's
policy would take ten minutes to forget the run before. Replica-seconds count from the start of a process.

    python -m tests.bench.scaling [--only zero,burst,serve,knative] [--pairs 5] [--seconds 90] [--out FILE]
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cluster.storage import open_store
from serving.ingress import ingress_env
from serving.simulator.traces import read_trace, scaled
from tests.bench import device_runtime
from tests.bench.asked import asked, finished
from tests.bench.environments import NotInstalled
from tests.bench.machine import distributions, machine_facts, use_cores
from tests.bench.open_loop import Planned, Render, drive, http_post
from tests.bench.pairs import Comparison, Measure, Report, in_turn
from tests.bench.peers import PEERS, SERVERS, peer_variables
from tests.bench.processes import NotStarted, Server, free_port, running
from tests.bench.zero_cost import zero_cost
from tests.servables import publish_mlp

CORES = 2
READY_WITHIN_S = 90
MOST = 6
CPUS = 0.1
SLO_MS = 300.0
DENSER = 50
SLICE_AT_S = 600.0
TRACE = Path(__file__).parents[3] / "shared" / "traces" / "azure_llm_2023_conv.csv"
IDLE_S = 2
FIRST_WITHIN_S = 60.0
BURST = 100
BURST_S = 0.1
COUNT_EVERY_S = 1.0


class Run(NamedTuple):
    """What one run of a trace came to."""

    violations: float
    replica_s: float


class Deployed(NamedTuple):
    """A server that scales."""

    server: Server
    port: int
    render: Render

    def replicas(self) -> int:
        """How many run or start."""
        found = 0
        for process in self.server.processes():
            with contextlib.suppress(Exception):
                found += "ServeReplica" in " ".join(process.cmdline()[:1])
        return found

    def answers(self) -> bool:
        """Whether a request is answered; wakes what sleeps."""
        return drive(self.port, [Planned(0.0, FIRST_WITHIN_S)], self.render)[0].status == 200


@contextlib.contextmanager
def tandem_on_device() -> Iterator[Deployed]:
    """`tandem serve` with the sleeping device, from one replica to `MOST`."""
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        folder, port = Path(name), free_port()
        command = device_runtime.command(folder, port, device_runtime.FIXED, SLO_MS, 32)
        variables = device_runtime.variables(folder, folder / "device.jsonl")
        _scale(folder / "service.yaml", {"min": 1, "max": MOST, "cpus": CPUS})
        with _started(command, variables, port, device_runtime.by_service) as deployed:
            yield deployed


@contextlib.contextmanager
def tandem_from_zero() -> Iterator[Deployed]:
    """`tandem serve` with a small graph and no replica to begin with."""
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        folder, port = Path(name), free_port()
        store = open_store(str(folder / "store"))
        publish_mlp(store, "digits")
        replicas = {"min": 0, "max": 2, "cpus": CPUS, "idle_s": IDLE_S}
        model = {"model": "digits@live", "slo_ms": 30_000, "replicas": replicas}
        service = {"store": store.uri, "models": [model], "drain_s": 30}
        (folder / "service.yaml").write_text(json.dumps(service))
        tandem = str(Path(sys.executable).with_name("tandem"))
        command = [tandem, "serve", str(folder / "service.yaml"), "--port", str(port), "--json"]
        variables = device_runtime.variables(folder, folder / "device.jsonl")
        body = json.dumps({"instances": [[0.0] * 64]}).encode()
        request = http_post("/v1/models/digits:predict", body, "content-type: application/json")
        with _started(command, variables, port, lambda planned, due_s: request) as deployed:
            yield deployed


@contextlib.contextmanager
def serve(kind: str, how: str) -> Iterator[Deployed]:
    """Ray Serve through HAProxy."""
    with tempfile.TemporaryDirectory(prefix="tb-") as name:
        folder, port = Path(name), free_port()
        ingress = ingress_env(folder=name)
        del ingress["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]  # that one is ours
        graph = folder / "model.onnx"
        graph.write_bytes(zero_cost().graph)
        variables = peer_variables(graph) | ingress | {"BENCH_DEVICE_LOG": str(folder / "device.jsonl")}
        python = str(PEERS["serve"].bin() / "python")
        command = [python, str(SERVERS / "serve_scaling.py"), kind, how, str(MOST), str(port)]
        body = json.dumps({"features": [0.0] * 64}).encode()
        request = http_post("/", body, "content-type: application/json")

        def render(planned: Planned, due_s: float) -> bytes:
            return http_post("/", b"", f"x-due: {due_s}") if kind == "device" else request

        with _started(command, variables, port, render) as deployed:
            yield deployed


@contextlib.contextmanager
def _started(
    command: list[str], variables: Mapping[str, str], port: int, render: Render
) -> Iterator[Deployed]:
    def ready() -> bool:
        return drive(port, [Planned(0.0, 2.0)], render)[0].status == 200

    with running(command, env=variables, ready=ready, within_s=READY_WITHIN_S) as server:
        yield Deployed(server, port, render)


def _scale(service: Path, replicas: Mapping[str, Any]) -> None:
    file = json.loads(service.read_text())
    file["models"][0]["replicas"] = replicas
    service.write_text(json.dumps(file))


class Counting(threading.Thread):
    """Counts replicas every second."""

    def __init__(self, deployed: Deployed) -> None:
        super().__init__(daemon=True)
        self._deployed = deployed
        self._over = threading.Event()
        self.replica_s = 0.0

    def run(self) -> None:
        last_s = time.monotonic()
        while not self._over.wait(COUNT_EVERY_S):
            replicas, now_s = self._deployed.replicas(), time.monotonic()
            self.replica_s += replicas * (now_s - last_s)
            last_s = now_s

    def stop(self) -> float:
        self._over.set()
        self.join(30)
        return self.replica_s


def replayed(deployed: contextlib.AbstractContextManager[Deployed], seconds: float) -> Run:
    """The slice of the trace, on a server started for it."""
    times_s = scaled(read_trace(TRACE), DENSER)
    times_s = times_s[(times_s >= SLICE_AT_S) & (times_s < SLICE_AT_S + seconds)] - SLICE_AT_S
    plan = [Planned(float(at_s), SLO_MS / 1000) for at_s in times_s]
    with deployed as target:
        counting = Counting(target)
        counting.start()
        sent = drive(target.port, plan, target.render)
        replica_s = counting.stop()
    return Run(sum(not one.in_time for one in sent), replica_s)


class Questions:
    """Each question is a method; what it finds goes into the report."""

    def __init__(self, report: Report, pairs: int, seconds: float) -> None:
        self._report = report
        self._pairs = pairs
        self._seconds = seconds

    def zero(self) -> None:
        with tandem_from_zero() as ours, serve("zero", "serve") as theirs:
            found = in_turn(
                lambda: self._first_s(ours, theirs), lambda: self._first_s(theirs, ours), self._pairs
            )
        self._report.comparisons.append(
            Comparison("first answer from zero, s", "Tandem", "Ray Serve", tuple(found), at_most=0.6)
        )

    def burst(self) -> None:
        plan = [Planned(BURST_S * number / BURST, 30.0) for number in range(BURST)]
        for name, started in (("Tandem", tandem_from_zero()), ("Ray Serve", serve("zero", "serve"))):
            missing = []
            with started as target:
                for _ in range(self._pairs):
                    _wait_for_none(target)
                    sent = drive(target.port, plan, target.render)
                    missing.append(float(sum(one.status != 200 for one in sent)))
            figure = f"{name}: of {BURST} requests at zero, not answered"
            self._report.measures.append(Measure(figure, tuple(missing), 0.0 if name == "Tandem" else None))

    def serve(self) -> None:
        self._trace("Ray Serve's default", lambda: serve("device", "serve"))

    def knative(self) -> None:
        self._trace("Knative's rules", lambda: serve("device", "knative"))

    def _trace(self, peer: str, started: Callable[[], contextlib.AbstractContextManager[Deployed]]) -> None:
        if not TRACE.is_file():
            self._report.notes.append(f"{peer}: {TRACE} is not there")
            return
        found = in_turn(
            lambda: replayed(tandem_on_device(), self._seconds),
            lambda: replayed(started(), self._seconds),
            self._pairs,
        )
        late = tuple((ours.violations, theirs.violations) for ours, theirs in found)
        used = tuple((ours.replica_s, theirs.replica_s) for ours, theirs in found)
        add = self._report.comparisons.append
        add(Comparison("requests not answered in time, trace", "Tandem", peer, late, at_most=0.5))
        add(Comparison("replica-seconds, trace", "Tandem", peer, used, at_most=1.0))

    @staticmethod
    def _first_s(target: Deployed, other: Deployed) -> float:
        target.server.resume()
        _wait_for_none(target)
        other.server.pause()
        try:
            sent = drive(target.port, [Planned(0.0, FIRST_WITHIN_S)], target.render)[0]
        finally:
            other.server.resume()
        return sent.latency_s


def _wait_for_none(target: Deployed) -> None:
    deadline_s = time.monotonic() + 120
    while target.replicas():
        if time.monotonic() > deadline_s:
            raise RuntimeError("the last replica never stopped")
        time.sleep(0.5)
    time.sleep(1.0)  # the door, too, must have heard of it


def main() -> int:
    chosen = asked(
        __doc__,
        only=(str, "zero,burst,serve,knative", "questions, by commas"),
        seconds=(float, 90.0, "of the trace"),
    )
    use_cores(CORES)
    report = Report(
        "Scaling, live", machine_facts(), {"both": distributions("tandem-ray", "ray", "onnxruntime")}
    )
    questions = Questions(report, chosen.pairs, chosen.seconds)
    for name in chosen.only.split(","):
        try:
            getattr(questions, name)()
        except (NotInstalled, NotStarted) as error:
            report.notes.append(f"{name} is missing: {error}")
    return finished(report, chosen)


if __name__ == "__main__":
    raise SystemExit(main())
