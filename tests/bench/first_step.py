"""How long until the first step is done, on a cluster that is up: Tandem, torchrun and Ray Train.

The clock starts with the command and stops when the first step has ended, so imports count. Each pair
is followed by the next peer's; one run of each beforehand is not counted, so that files are cached and
Ray has its idle workers. Where Tandem's time goes is read from its output, its events, and the moments
at which its processes were started and renamed.

Two cores are busy all the way, so what counts is what is imported, how often, and in how many processes. On
2 cores of an EPYC, with Ray 2.60 and torch 2.13, these paid:
- the nursery imports with the garbage collector off: 1.42 s rather than 2.10 s with the pass at its end;
- it imports torch._dynamo too, which every DDP and optimizer needs: 0.27 s once, rather than 0.35 s in each
  member between its fork and its first step;
- keepers and Ray Train's controller are called before the recipe is checked, and Ray Train is imported by
  the controller only, not by the driver too (0.75 s): with the two above, 9.4 s became 5.5 s (2 starts each;
  1.89 and 1.45 times torchrun in the same minutes);
- recipes of built-in tasks are checked without torch: 1.0 s less of the driver's time.
These didn't:
- keeping DTensor, and sympy with it, out of the member (0.5 s alone): DDP imports torch._dynamo, which does
  so anyway;
- joining the first question to the cluster and `ray.init`: together they take less than 0.1 s;
- counting the model's FLOPs after the first step instead of before it: on a CPU, whose peak isn't known,
  they aren't counted at all.

    python -m tests.bench.first_step [--pairs 5] [--out FILE]
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from cluster.events import read_events
from cluster.runs import Run
from cluster.storage import open_store
from tests.bench.asked import asked, finished
from tests.bench.commands import ENDS_WITHIN_S, running_command
from tests.bench.image_recipe import GLOBAL_BATCH_ROWS, WORKERS, write_recipe
from tests.bench.machine import distributions, machine_facts, use_cores
from tests.bench.pairs import Comparison, Measure, Report, in_turn
from tests.bench.warm_cluster import WarmCluster, warm_cluster

BIN = Path(sys.executable).parent
ROWS, WIDTH = 4096, 32
AIM = 1.5
STEPS = 4
"""A peer ends after so many; how long it goes on doesn't matter here."""
STAGES = (
    ("the driver's first imports", ("reading the data",)),
    ("Ray imported, connected; keeper and controller called", ("process python -m training.crew.nursery",)),
    ("torch imported, recipe and data checked, the lease (workers import meanwhile)", ("starting workers",)),
    ("coordinator placed, Ray Train given its order", ("process ray::Controller.run",)),
    ("Ray Train's workers placed, seats taken", ("process ray::Attendant.run_train_fn",)),
    ("training processes forked (once torch is imported there), group and state", ("event attempt-started",)),
)
"""What comes one after the other on the way to the first step, and by what its end is known."""
_WATCH_EVERY_S = 0.03


@dataclass
class Start:
    """One start. Times in seconds from the command."""

    first_step_s: float
    parts: dict[str, float] = field(default_factory=dict)
    """When each sign of a stage was first seen."""

    def reached_s(self, signs: tuple[str, ...]) -> float | None:
        """When the first of these signs was seen, each the beginning of a part's name."""
        return min((at_s for part, at_s in self.parts.items() if part.startswith(signs)), default=None)


class Bench:
    """What all starts of one comparison share."""

    def __init__(self, folder: Path, cluster: WarmCluster) -> None:
        self._folder = folder
        self._cluster = cluster
        self._numbers = itertools.count(1)
        self._recipe = write_recipe(folder, rows=ROWS, epochs=1, width=WIDTH)

    def command_line(self) -> Start:
        """`tandem train --address`."""
        name = f"first-{next(self._numbers)}"
        command = [str(BIN / "tandem"), "train", str(self._recipe), "--run", name, "--json"]
        return self._tandem([*command, "--address", self._cluster.address], name)

    def from_python(self) -> Start:
        """`training.run.train` in a program."""
        name = f"first-{next(self._numbers)}"
        program = [sys.executable, "-m", "tests.bench.trainers.tandem_driver"]
        return self._tandem([*program, str(self._recipe), name, self._cluster.address], name)

    def torchrun(self) -> Start:
        """The same by hand."""
        command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(WORKERS)]
        command += ["-m", "tests.bench.trainers.torchrun_ddp", str(self._recipe)]
        # Decoding in the training process starts fastest.
        return self._peer([*command, "--loader-processes", "0", "--steps", str(STEPS)])

    def ray_train(self) -> Start:
        """The same on Ray Train."""
        command = [sys.executable, "-m", "tests.bench.trainers.ray_train", str(self._recipe)]
        command += ["--address", self._cluster.address, "--steps", str(STEPS)]
        command += ["--storage", str(self._folder / "ray"), "--name", f"first-{next(self._numbers)}"]
        return self._peer(command)

    def _peer(self, command: list[str]) -> Start:
        with running_command(command, {**self._cluster.variables, "OMP_NUM_THREADS": "1"}) as running:
            found = running.result()
        stages = {name: at - running.started_s for name, at in found.items() if name.endswith("_at_s")}
        return Start(stages["first_step_at_s"], stages)

    def _tandem(self, command: list[str], name: str) -> Start:
        started_at = datetime.now(UTC)
        with running_command(command, self._cluster.variables) as running, _Births() as births:
            result = running.result(ENDS_WITHIN_S)
        run = Run(open_store(str(self._folder / "store")), name)
        events = list(read_events(run.store, run.prefix))
        first_at = first_step_at(events, result["samples_per_s"])
        stages = {line.text[:40]: line.at_s - running.started_s for line in running.err}
        stages |= {f"process {text}": at - running.started_s for text, at in births.seen.items()}
        for event in events:
            at = datetime.fromisoformat(event["at"])
            if at <= first_at:
                label = f"event {event['event']}, rank {event.get('rank', '-')}"
                stages.setdefault(label, (at - started_at).total_seconds())
        return Start((first_at - started_at).total_seconds(), stages)


def first_step_at(events: list[dict[str, Any]], samples_per_s: float) -> datetime:
    """When the first step ended: said by an event of step 1, or counted back from the first that tells of
    a step, at the steady speed."""
    told = next(event for event in events if event["event"] in ("step", "first-step"))
    since_s = (told["step"] - 1) * GLOBAL_BATCH_ROWS / samples_per_s
    return datetime.fromisoformat(told["at"]) - timedelta(seconds=since_s)


class _Births(AbstractContextManager["_Births"]):
    """When processes of Ray's workers and of ours first had each title, by looking all the time."""

    def __init__(self) -> None:
        self.seen: dict[str, float] = {}
        self._old = {process.pid for process in psutil.process_iter()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> _Births:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(_WATCH_EVERY_S):
            for entry in Path("/proc").iterdir():
                if entry.name.isdigit():
                    self._look(entry)

    def _look(self, entry: Path) -> None:
        try:
            title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            return
        if title.startswith("ray::") and not title.startswith("ray::IDLE"):
            self.seen.setdefault(title, time.monotonic())
        elif int(entry.name) not in self._old and ("training." in title or "cluster." in title):
            self.seen.setdefault(_program(title), time.monotonic())


def _program(title: str) -> str:
    """`python -m MODULE ARGUMENTS`, wherever that Python is."""
    path, _, rest = title.partition(" ")
    return f"{Path(path).name.rstrip('0123456789.')} {rest}"


def _told(name: str, start: Callable[[], Start]) -> Callable[[], Start]:
    """`start`, saying on stderr what it took."""

    def measured() -> Start:
        found = start()
        print(f"{found.first_step_s:7.2f} s  {name}", file=sys.stderr, flush=True)  # noqa: T201
        return found

    return measured


def compare(bench: Bench, pairs: int, report: Report) -> None:
    """All pairs against both peers."""
    peers: list[tuple[str, Callable[[], Start], float | None]] = [
        ("torchrun DDP", bench.torchrun, AIM),
        ("Ray Train", bench.ray_train, None),
    ]
    ours: list[tuple[str, Callable[[], Start]]] = [
        ("tandem train --address", bench.command_line),
        ("the same from Python", bench.from_python),
    ]
    for _, start in [*ours, *((name, start) for name, start, _ in peers)]:
        start()
    starts: list[Start] = []
    for number, (our_name, our_start) in enumerate(ours):
        for peer_name, peer_start, at_most in peers:
            if number and peer_name != "torchrun DDP":
                continue
            found = in_turn(_told(our_name, our_start), _told(peer_name, peer_start), pairs)
            starts += [mine for mine, _ in found] if number == 0 else []
            values = tuple((mine.first_step_s, theirs.first_step_s) for mine, theirs in found)
            report.comparisons.append(
                Comparison("s to the first step's end", our_name, peer_name, values, at_most=at_most)
            )
    report.measures += stages_of(starts)


def stages_of(starts: list[Start]) -> list[Measure]:
    """How long each stage took, in order; one that wasn't seen in every start is left to the next."""
    measures, before_s = [], [0.0] * len(starts)
    for stage, signs in STAGES:
        reached_s = [start.reached_s(signs) for start in starts]
        if all(at_s is not None for at_s in reached_s):
            ends_s = [at_s or 0.0 for at_s in reached_s]
            took_s = tuple(end_s - start_s for end_s, start_s in zip(ends_s, before_s, strict=True))
            measures.append(Measure(f"s: {stage}", took_s))
            before_s = ends_s
    last_s = tuple(start.first_step_s - at_s for start, at_s in zip(starts, before_s, strict=True))
    return [*measures, Measure("s: the first step", last_s)]


def main() -> int:
    chosen = asked(__doc__)
    use_cores(WORKERS)
    report = Report(
        "Time to the first step, 2 workers, a Ray that is up",
        machine_facts(),
        {"both": distributions("tandem-ray", "ray", "torch")},
    )
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        folder = Path(name)
        with warm_cluster(folder, num_cpus=WORKERS) as cluster:
            compare(Bench(folder, cluster), chosen.pairs, report)
    report.notes += [
        f"{ROWS} images, network of width {WIDTH}, batch {GLOBAL_BATCH_ROWS}; one run of each beforehand,"
        " not counted; imports count on all sides",
    ]
    return finished(report, chosen)


if __name__ == "__main__":
    raise SystemExit(main())
