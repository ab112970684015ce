"""How soon a worker's resources are free after `tandem runs lend`, and what the run loses by it.

Two workers train on a Ray that is up; one is asked for. The clock runs from the command's start until
another driver on the same Ray sees the CPU free. Steps lost are those that were finished and taken again.

    python -m tests.bench.lending [--pairs 5] [--out FILE]
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from cluster.connection import connect
from cluster.events import read_events
from cluster.runs import Run
from cluster.storage import open_store
from tests.bench.asked import asked, finished
from tests.bench.commands import running_command
from tests.bench.image_recipe import GLOBAL_BATCH_ROWS, WORKERS, write_recipe
from tests.bench.machine import distributions, machine_facts, use_cores
from tests.bench.pairs import Measure, Report
from tests.bench.trainers.stamps import read_stamps
from tests.bench.warm_cluster import WarmCluster, warm_cluster

BIN = Path(sys.executable).parent
ROWS, WIDTH, EPOCHS = 4096, 32, 1000
STEPS_BEFORE = 50
WITHIN_S = 90
LIMIT_S = 3.0


@dataclass(frozen=True)
class Loan:
    """One worker lent."""

    free_s: float
    """From the command's start until the CPU is free."""
    step_s: float
    """What a step took before."""
    lost_steps: int


def lend(folder: Path, cluster: WarmCluster, name: str) -> Loan:
    """Start a run, lend one of its two workers, end it."""
    import ray

    stamps = folder / name / "stamps"
    stamps.mkdir(parents=True)
    workers = {"min": 1, "max": WORKERS, "cpus": 1}
    more: dict[str, Any] = {"rows": ROWS, "epochs": EPOCHS, "width": WIDTH}
    recipe = write_recipe(folder / name, stamps=stamps, workers=workers, **more)
    run = Run(open_store(str(folder / name / "store")), name)
    train = [str(BIN / "tandem"), "train", str(recipe), "--run", name, "--address", cluster.address]
    ask = [str(BIN / "tandem"), "runs", "lend", name, "--workers", "1", "--for", "10m"]
    ask += ["--address", cluster.address, "--json"]

    def at_work() -> bool:
        begun = {stamp.rank for stamp in read_stamps(stamps) if stamp.number >= STEPS_BEFORE}
        return len(begun) == WORKERS

    def starts() -> list[dict[str, Any]]:
        events = read_events(run.store, run.prefix)
        return [e for e in events if e["event"] == "attempt-started" and e["world"] == 1]

    with running_command(train, cluster.variables) as running:
        running.until(at_work, WITHIN_S, "enough steps")
        with running_command(ask, cluster.variables) as asking:
            running.until(lambda: ray.available_resources().get("CPU", 0) >= 1, WITHIN_S, "a free CPU")
            free_s = time.monotonic() - asking.started_s
            asking.result()
        running.until(lambda: bool(starts()), WITHIN_S, "a generation of one worker")
        resumed_at = starts()[0]["step"]
        written = read_stamps(stamps)
    taken = [
        [stamp.at_s for stamp in written if stamp.pid == pid] for pid in {stamp.pid for stamp in written}
    ]
    left = min(taken, key=len)  # who left has taken no step since
    step_s = median(late_s - early_s for early_s, late_s in itertools.pairwise(left))
    return Loan(free_s, step_s, max(0, len(left) - resumed_at))


def main() -> int:
    chosen = asked(__doc__)
    use_cores(WORKERS)
    report = Report(
        "Lending one of 2 workers", machine_facts(), {"ours": distributions("tandem-ray", "ray", "torch")}
    )
    with (
        tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder,
        warm_cluster(Path(folder), num_cpus=WORKERS) as cluster,
        connect(cluster.address),
    ):
        loans = [lend(Path(folder), cluster, f"lend-{number}") for number in range(chosen.pairs)]
    net_s = tuple(loan.free_s - loan.step_s for loan in loans)
    report.measures += [
        Measure("s from `tandem runs lend` to a free CPU, less a step", net_s, LIMIT_S),
        Measure("steps lost", tuple(float(loan.lost_steps) for loan in loans), at_most=0),
    ]
    step_s = median(loan.step_s for loan in loans)
    report.notes.append(
        f"a step of {GLOBAL_BATCH_ROWS} rows takes {step_s:.3f} s; the command's own start counts"
    )
    return finished(report, chosen)


if __name__ == "__main__":
    raise SystemExit(main())
