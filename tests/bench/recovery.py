"""How long after a worker's death training goes on: Tandem beside idiomatic Ray Train, same model and data.

Both run on one Ray that is up. Once both workers have taken some steps, one is killed (SIGKILL), and the
clock runs until a process that wasn't there before has finished a step with the rest of the group: the
moment its second step begins, as it writes down itself. Also: the death of the Ray actor that holds
Tandem's training process, and how soon a worker that is stopped (SIGSTOP) is replaced.

    python -m tests.bench.recovery [--pairs 5] [--out FILE]
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from cluster.events import read_events
from cluster.runs import Run
from cluster.storage import open_store
from tests.bench.asked import asked, finished
from tests.bench.commands import Command, running_command
from tests.bench.image_recipe import GLOBAL_BATCH_ROWS, WORKERS, write_recipe
from tests.bench.machine import distributions, machine_facts, use_cores
from tests.bench.pairs import Comparison, Measure, Report, in_turn
from tests.bench.trainers.stamps import Stamp, read_stamps
from tests.bench.warm_cluster import WarmCluster, warm_cluster

BIN = Path(sys.executable).parent
ROWS, WIDTH, EPOCHS = 4096, 32, 1000
SAVE_EVERY_STEPS = 20
STEPS_BEFORE = 50
"""Both have saved by then."""
STARTS_WITHIN_S = 90
RECOVERS_WITHIN_S = 120
RAYS_HANG_LIMIT_S = 600
"""Ray Train's default (RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S), quoted, not waited for."""


@dataclass(frozen=True)
class Recovery:
    """One fault and what came after it."""

    next_step_s: float
    """From the fault to the end of the first step that a new process took part in."""
    redone_steps: int
    """Finished before the fault, and taken again after it."""


Start = Callable[[str, Path], contextlib.AbstractContextManager[Command]]


class Bench:
    """What all faults of one comparison share."""

    def __init__(self, folder: Path, cluster: WarmCluster) -> None:
        self._folder = folder
        self._cluster = cluster
        self._numbers = itertools.count(1)

    def killed(self, start: Start) -> Recovery:
        """SIGKILL of rank 1's process, which is what trains."""
        return self._fault(start, lambda stamp: os.kill(stamp.pid, signal.SIGKILL))

    def stopped(self, start: Start) -> Recovery:
        """SIGSTOP of rank 1's process: it is there, and does nothing."""
        return self._fault(start, lambda stamp: os.kill(stamp.pid, signal.SIGSTOP))

    def without_its_actor(self, start: Start) -> Recovery:
        """SIGKILL of the Ray worker process from which rank 1's training process descends."""
        return self._fault(start, lambda stamp: _ray_parent(stamp.pid).kill())

    @contextlib.contextmanager
    def tandem(self, name: str, recipe: Path) -> Iterator[Command]:
        """`tandem train --address`."""
        command = [str(BIN / "tandem"), "train", str(recipe), "--run", name, "--json"]
        command += ["--address", self._cluster.address]
        with running_command(command, self._cluster.variables) as running:
            yield running

    @contextlib.contextmanager
    def ray_train(self, name: str, recipe: Path) -> Iterator[Command]:
        """The idiomatic script."""
        command = [sys.executable, "-m", "tests.bench.trainers.ray_train", str(recipe), "--name", name]
        command += ["--address", self._cluster.address, "--storage", str(self._folder / "ray")]
        command += ["--stamps", str(recipe.parent / "stamps"), "--save-every-steps", str(SAVE_EVERY_STEPS)]
        with running_command(command, self._cluster.variables) as running:
            yield running

    def _fault(self, start: Start, strike: Callable[[Stamp], None]) -> Recovery:
        name = f"recovery-{next(self._numbers)}"
        stamps = self._folder / name / "stamps"
        stamps.mkdir(parents=True)
        recipe = write_recipe(
            self._folder / name,
            rows=ROWS,
            epochs=EPOCHS,
            width=WIDTH,
            stamps=stamps,
            checkpoint={"every_s": None, "every_steps": SAVE_EVERY_STEPS},
        )
        with start(name, recipe) as running:
            running.until(lambda: _all_at(stamps, STEPS_BEFORE), STARTS_WITHIN_S, "enough steps")
            before = read_stamps(stamps)
            victim = [stamp for stamp in before if stamp.rank == 1][-1]
            struck_s = time.monotonic()
            strike(victim)
            known = {stamp.pid for stamp in before}
            running.until(lambda: bool(_after(stamps, known)), RECOVERS_WITHIN_S, "a recovery")
            first = _after(stamps, known)[0]
            finished_steps = victim.number - 1
            resumed_at = first.step - 1 if first.step is not None else self._resumed_at(name, running)
            return Recovery(first.at_s - struck_s, max(0, finished_steps - resumed_at))

    def _resumed_at(self, name: str, running: Command) -> int:
        """The step from which Tandem's second generation went on, by its events."""
        run = Run(open_store(str(self._folder / name / "store")), name)

        def found() -> list[int]:
            starts = [e for e in read_events(run.store, run.prefix) if e["event"] == "attempt-started"]
            return [start["step"] for start in starts if start.get("generation") == 2]

        running.until(lambda: bool(found()), RECOVERS_WITHIN_S, "an event of the second generation")
        return found()[0]


def _all_at(stamps: Path, number: int) -> bool:
    """Whether every rank has begun step `number`."""
    return {stamp.rank for stamp in read_stamps(stamps) if stamp.number >= number} == set(range(WORKERS))


def _after(stamps: Path, known: set[int]) -> list[Stamp]:
    """Where processes that weren't there before begin their second step."""
    return [stamp for stamp in read_stamps(stamps) if stamp.pid not in known and stamp.number == 2]


def _ray_parent(pid: int) -> psutil.Process:
    """The nearest ancestor, itself included, that is a Ray worker."""
    process = psutil.Process(pid)
    for candidate in [process, *process.parents()]:
        if candidate.cmdline()[:1] and candidate.cmdline()[0].startswith("ray::"):
            return candidate
    raise LookupError(f"process {pid} does not descend from a Ray worker")


def main() -> int:
    chosen = asked(__doc__)
    use_cores(WORKERS)
    report = Report(
        "Recovery, 2 workers, one is lost",
        machine_facts(),
        {"both": distributions("tandem-ray", "ray", "torch")},
    )
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        folder = Path(name)
        with warm_cluster(folder, num_cpus=WORKERS) as cluster:
            bench = Bench(folder, cluster)
            found = in_turn(
                lambda: bench.killed(bench.tandem), lambda: bench.killed(bench.ray_train), chosen.pairs
            )
            actors = [bench.without_its_actor(bench.tandem) for _ in range(chosen.pairs)]
            stops = [bench.stopped(bench.tandem) for _ in range(chosen.pairs)]
    values = tuple((ours.next_step_s, theirs.next_step_s) for ours, theirs in found)
    figure = "s from SIGKILL to the next finished step"
    report.comparisons.append(Comparison(figure, "tandem train", "Ray Train", values, at_most=0.5))
    redone = tuple((float(ours.redone_steps), float(theirs.redone_steps)) for ours, theirs in found)
    report.comparisons.append(Comparison("steps taken again", "tandem train", "Ray Train", redone))
    report.measures += [
        Measure("s from the death of its Ray actor to the next step", tuple(a.next_step_s for a in actors)),
        Measure("s from SIGSTOP to the next step", tuple(s.next_step_s for s in stops), at_most=15),
    ]
    report.notes += [
        f"network of width {WIDTH}, batch {GLOBAL_BATCH_ROWS}, a checkpoint every {SAVE_EVERY_STEPS} steps"
        " on both sides; Ray Train: max_failures, the latest checkpoint restored by get_checkpoint()",
        f"a stopped worker: Ray Train's default waits {RAYS_HANG_LIMIT_S} s (quoted, not measured)",
    ]
    return finished(report, chosen)


if __name__ == "__main__":
    raise SystemExit(main())
