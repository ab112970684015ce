"""Batching to a deadline, over real HTTP: how many requests a second are answered in time.

A model that sleeps 50 ms and 1 ms for each row, at most 32 at once, so its capacity is 390 rows/s. Requests
come at random times, open-loop, and each is timed from when it was to be sent. Tandem runs as `tandem serve`,
through HAProxy, its peers as their documentation says:

    serve      `@serve.batch` with a handler that yields, through HAProxy; 150/s, 300 ms
    one        BentoML at the better of two limits; 500/s (1.3 times the capacity), 300 ms
    mixed      BentoML at the better of two limits; 500/s, half with 200 ms, half with 1.5 s
    overload   ourselves: twice the capacity beside its 1.0
    lengths    first in, first out, padded to the longest; lengths of a trace, 5 µs for each padded token

BentoML has one limit for all requests, by which it gives up those at the head of its queue. At the limit that
clients have it answers many just too late, so it also gets a shorter one, and its better result counts. (With
mixed deadlines the longer of the two would lose it all requests with the shorter.)

One server of each pair runs while it is measured; the others are paused.

    python -m tests.bench.batching [--only one,mixed] [--pairs 5] [--seconds 5] [--out FILE]
"""

from __future__ import annotations

import contextlib
import csv
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster.signature import Signature
from serving.ingress import ingress_env
from tests.bench import device_runtime
from tests.bench.asked import asked, finished
from tests.bench.environments import NotInstalled
from tests.bench.machine import distributions, machine_facts, use_cores
from tests.bench.open_loop import Planned, Render, Sent, drive, http_post
from tests.bench.pairs import Comparison, Measure, Report, in_turn
from tests.bench.peers import PEERS, SERVERS, peer_variables
from tests.bench.processes import NotStarted, Server, free_port, running

CORES = 2
READY_WITHIN_S = 90
WARM_UP_S = 3.0
MAX_ROWS = 32
CAPACITY = 390
TRACE = Path(__file__).parents[3] / "shared" / "traces" / "azure_llm_2023_conv.csv"
LONGEST = 2048
"""Tokens; what is longer in the trace is cut to it, as a model's context does."""

Plan = Callable[[int, float], list[Planned]]
"""From a seed and seconds to the requests."""


@dataclass
class Target:
    """A server that is asked."""

    name: str
    server: Server
    port: int
    render: Render
    log: Path
    sent: list[Sent] = field(default_factory=list)
    """Of all measurements."""

    def goodput(self, plan: Sequence[Planned]) -> float:
        """Requests a second answered in time."""
        self.server.resume()
        try:
            sent = drive(self.port, plan, self.render)
        finally:
            self.server.pause()
        self.sent += sent
        return sum(one.in_time for one in sent) / plan[-1].at_s

    def warm_up(self, plan: Plan) -> None:
        """Some load, uncounted; then paused."""
        self.goodput(plan(99, WARM_UP_S))
        self.sent.clear()
        self.log.unlink(missing_ok=True)

    def device(self) -> Mapping[str, int]:
        """Sums over all batches: rows, rows run after their time, own and padded elements; batches."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return {"batches": len(lines)} | {name: sum(line[name] for line in lines) for name in lines[0]}


def poisson(rate: float, *within_s: float, lengths: Sequence[int] = (0,)) -> Plan:
    """Requests at random times, with one of these limits and lengths each."""

    def plan(seed: int, seconds: float) -> list[Planned]:
        rng, at_s, found = random.Random(seed), 0.0, []
        while (at_s := at_s + rng.expovariate(rate)) < seconds:
            found.append(Planned(at_s, rng.choice(within_s), rng.choice(lengths)))
        return found

    return plan


@contextlib.contextmanager
def tandem(slo_ms: float, render: Render, signature: Signature = device_runtime.FIXED) -> Iterator[Target]:
    """`tandem serve` with the device."""
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        folder, port = Path(name), free_port()
        command = device_runtime.command(folder, port, signature, slo_ms, MAX_ROWS)
        variables = device_runtime.variables(folder, folder / "device.jsonl")
        with _started("Tandem", command, variables, port, render, folder / "device.jsonl") as target:
            yield target


@contextlib.contextmanager
def ray_serve(render: Render, *options: str) -> Iterator[Target]:
    """Ray Serve through HAProxy."""
    with tempfile.TemporaryDirectory(prefix="tb-") as name:
        folder, port = Path(name), free_port()
        ingress = ingress_env(folder=name)
        del ingress["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"]  # that one is ours
        variables = peer_variables(folder) | ingress | {"BENCH_DEVICE_LOG": str(folder / "device.jsonl")}
        peer = PEERS["serve"]
        command = [str(peer.bin() / "python"), str(SERVERS / "serve_device.py"), *options, str(port)]
        with _started("Ray Serve", command, variables, port, render, folder / "device.jsonl") as target:
            yield target


@contextlib.contextmanager
def bentoml(max_latency_ms: int) -> Iterator[Target]:
    """BentoML with that limit."""
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        folder, port = Path(name), free_port()
        variables = peer_variables(folder) | {
            "BENCH_DEVICE_LOG": str(folder / "device.jsonl"),
            "BENCH_MAX_LATENCY_MS": str(max_latency_ms),
        }
        command = [
            *(str(PEERS["bentoml"].bin() / "bentoml"), "serve", "bento_device:Model"),
            *("--working-dir", str(SERVERS), "--host", "127.0.0.1", "--port", str(port)),
        ]
        title = f"BentoML, {max_latency_ms} ms"
        with _started(title, command, variables, port, _ask_bentoml, folder / "device.jsonl") as target:
            yield target


@contextlib.contextmanager
def _started(
    name: str, command: list[str], variables: Mapping[str, str], port: int, render: Render, log: Path
) -> Iterator[Target]:
    def ready() -> bool:
        return drive(port, [Planned(0.0, 2.0, 1)], render)[0].status == 200

    with running(command, env=variables, ready=ready, within_s=READY_WITHIN_S) as server:
        yield Target(name, server, port, render, log)


def _ask_bentoml(planned: Planned, due_s: float) -> bytes:
    return http_post("/predict", json.dumps({"due": [[due_s]]}).encode(), "content-type: application/json")


def _ask_serve(planned: Planned, due_s: float) -> bytes:
    return http_post("/", json.dumps({"due": due_s}).encode(), "content-type: application/json")


def _ask_fifo(planned: Planned, due_s: float) -> bytes:
    return http_post("/", b"\x01" * planned.length, f"x-due: {due_s}")


class Questions:
    """Each question is a method; what it finds goes into the report."""

    def __init__(self, report: Report, pairs: int, seconds: float) -> None:
        self._report = report
        self._pairs = pairs
        self._seconds = seconds

    def serve(self) -> None:
        plan = poisson(150, 0.3)
        with tandem(300, device_runtime.by_service) as ours, ray_serve(_ask_serve) as theirs:
            self._beside("150/s, 300 ms", [plan], ours, [theirs], aim=10)

    def one(self) -> None:
        with (
            tandem(300, device_runtime.by_service) as ours,
            bentoml(300) as edge,
            bentoml(250) as early,
        ):
            self._beside("500/s, 300 ms", [poisson(500, 0.3)], ours, [edge, early], aim=0.98)
            self._promises("500/s, 300 ms", ours)

    def mixed(self) -> None:
        plan = poisson(500, 0.2, 1.5)
        with (
            tandem(1500, device_runtime.by_header) as ours,
            bentoml(200) as edge,
            bentoml(160) as early,
        ):
            self._beside("500/s, half 200 ms, half 1.5 s", [plan], ours, [edge, early], aim=1.1)
            self._promises("mixed deadlines", ours)

    def overload(self) -> None:
        twice, once = poisson(2 * CAPACITY, 0.3), poisson(CAPACITY, 0.3)
        with tandem(300, device_runtime.by_service) as ours:
            ours.warm_up(once)
            found = self._in_turn(lambda seed: ours.goodput(twice(seed, self._seconds)), lambda seed: 0.0)
            self._promises("2x the capacity", ours)
            peak = [ours.goodput(once(seed, self._seconds)) for seed in range(self._pairs)]
        values = tuple((over, at) for (over, _), at in zip(found, peak, strict=True))
        figure = "requests/s in time, 2x the capacity beside 1x"
        self._report.comparisons.append(Comparison(figure, "at 2x", "Tandem at 1x", values, aim=0.95))

    def lengths(self) -> None:
        if not TRACE.is_file():
            self._report.notes.append(f"lengths: {TRACE} is not there")
            return
        with TRACE.open() as file:
            lengths = [min(int(row["ContextTokens"]), LONGEST) for row in csv.DictReader(file)]
        lengths = [length for length in lengths if length]
        rates = (60, 140)
        plans = [poisson(rate, 1.0, lengths=lengths) for rate in rates]
        with (
            tandem(1000, device_runtime.with_tokens, device_runtime.VARYING) as ours,
            ray_serve(_ask_fifo, "--fifo") as theirs,
        ):
            # The better of two loads, one for each: beyond its capacity a plain queue answers hardly anyone.
            self._beside("best of 60 and 140/s, trace's lengths, 1 s", plans, ours, [theirs], aim=1.5)
            self._promises("lengths", ours)
            for target in (ours, theirs):
                device = target.device()
                share = 1 - device["own"] / device["padded"]
                self._report.measures.append(Measure(f"{target.name}: share of padding", (share,)))

    def _beside(
        self, what: str, plans: Sequence[Plan], ours: Target, theirs: Sequence[Target], aim: float
    ) -> None:
        """Compare with the best of the others, each at the load that suits it best."""
        for target in (ours, *theirs):
            target.warm_up(plans[0])

        def best(targets: Sequence[Target], seed: int) -> float:
            return max(t.goodput(plan(seed, self._seconds)) for t in targets for plan in plans)

        found = self._in_turn(lambda seed: best([ours], seed), lambda seed: best(theirs, seed))
        peer = " or ".join(target.name for target in theirs)
        figure = f"requests/s in time, {what}"
        self._report.comparisons.append(Comparison(figure, ours.name, peer, tuple(found), aim=aim))

    def _in_turn(
        self, ours: Callable[[int], float], theirs: Callable[[int], float]
    ) -> list[tuple[float, float]]:
        """`in_turn`, each pair with requests of its own."""
        seeds = [iter(range(self._pairs)), iter(range(self._pairs))]
        return in_turn(lambda: ours(next(seeds[0])), lambda: theirs(next(seeds[1])), self._pairs)

    def _promises(self, what: str, ours: Target) -> None:
        """What Tandem holds whatever comes."""
        answered = sorted(one.latency_s / one.planned.within_s for one in ours.sent if one.status == 200)
        refused = sorted(one.latency_s * 1000 for one in ours.sent if one.status == 503)
        device = ours.device()
        add = self._report.measures.append
        add(Measure(f"{what}: answered, p99 of latency / deadline", (_quantile(answered, 0.99),), 1.0))
        add(Measure(f"{what}: rows run after their deadline", (float(device["expired"]),), 0.0))
        add(Measure(f"{what}: rows a batch", (device["rows"] / device["batches"],)))
        if refused:
            early = [one for one in ours.sent if one.status == 503 and b"any more" not in one.text]
            at_door = sorted(one.latency_s * 1000 for one in early)
            add(Measure(f"{what}: refused at the door, median ms", (_quantile(at_door, 0.5),), 5.0))
            add(Measure(f"{what}: refused at the door, p99 ms", (_quantile(at_door, 0.99),)))
            add(Measure(f"{what}: refused at the door, p90 ms", (_quantile(at_door, 0.9),)))
            late = (len(refused) - len(early)) / len(ours.sent)
            add(Measure(f"{what}: let in and given up later, of all", (late,)))
        strange = sum(one.status not in (200, 503, 504) for one in ours.sent)
        add(Measure(f"{what}: other answers, or none", (float(strange),), 0.0))


def _quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def main() -> int:
    names = ("serve", "one", "mixed", "overload", "lengths")
    chosen = asked(
        __doc__,
        only=(str, ",".join(names), "questions, by commas"),
        seconds=(float, 5.0, "of each measurement"),
    )
    use_cores(CORES)
    report = Report(
        "Batching to a deadline (device 50 ms + 1 ms a row, 32 rows), open loop over HTTP",
        machine_facts(),
        {"ours": distributions("tandem-ray", "ray"), "peers": ", ".join(PEERS["bentoml"].requirements)},
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
