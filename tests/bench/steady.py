"""Samples a second with two workers, Tandem with everything switched on beside torchrun DDP by hand.

Each pair runs `tandem train` and the same training by hand on the same data, one after the other, on the
same two cores; counted from the end of the first step to the end of the last. Tandem's checkpoints are
hashed and saved every few seconds, far more often than anyone would.

    python -m tests.bench.steady [--pairs 5] [--rows 16384] [--width 32] [--every-s 5] [--out FILE]
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from cluster.runs import Run
from cluster.storage import open_store
from tests.bench.asked import asked, finished
from tests.bench.commands import running_command
from tests.bench.image_recipe import GLOBAL_BATCH_ROWS, WORKERS, write_recipe
from tests.bench.machine import distributions, machine_facts, use_cores
from tests.bench.pairs import Comparison, Report, in_turn

AIM = 0.98
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Speed:
    """One run."""

    samples_per_s: float
    whole_s: float
    checkpoints: int = 0


def tandem(recipe: Path, folder: Path, number: int) -> Speed:
    """`tandem train` on the recipe, with a Ray of its own, from command to exit."""
    name = f"steady-{number}"
    command = [str(BIN / "tandem"), "train", str(recipe), "--run", name, "--json"]
    with running_command(command, {"TANDEM_STATE_DIR": str(folder / "state")}) as running:
        result = running.result()
    run = Run(open_store(str(folder / "store")), name)
    return Speed(result["samples_per_s"], time.monotonic() - running.started_s, run.checkpoints().head())


def torchrun(recipe: Path) -> Speed:
    """The same by hand, from command to exit."""
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(WORKERS)]
    command += ["-m", "tests.bench.trainers.torchrun_ddp", str(recipe)]
    with running_command(command, {"OMP_NUM_THREADS": "1"}) as running:
        result = running.result()
    return Speed(result["samples_per_s"], time.monotonic() - running.started_s)


def main() -> int:
    chosen = asked(
        __doc__,
        rows=(int, 16_384, f"a multiple of {GLOBAL_BATCH_ROWS}"),
        epochs=(int, 1, "passes over them"),
        width=(int, 32, "of the network"),
        every_s=(float, 5.0, "between two checkpoints"),
    )
    use_cores(WORKERS)
    report = Report(
        "Steady speed, image classification, 2 data-parallel workers",
        machine_facts(),
        {"both": distributions("tandem-ray", "ray", "torch")},
    )
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        folder = Path(name)
        recipe = write_recipe(
            folder,
            rows=chosen.rows,
            epochs=chosen.epochs,
            width=chosen.width,
            checkpoint={"every_s": chosen.every_s},
        )
        numbers = itertools.count(1)
        found = in_turn(lambda: tandem(recipe, folder, next(numbers)), lambda: torchrun(recipe), chosen.pairs)
    rates = tuple((ours.samples_per_s, by_hand.samples_per_s) for ours, by_hand in found)
    report.comparisons.append(Comparison("samples/s, steady", "tandem train", "torchrun DDP", rates, AIM))
    steps = chosen.epochs * (chosen.rows // GLOBAL_BATCH_ROWS)
    whole_s = median(ours.whole_s for ours, _ in found)
    report.notes += [
        f"{chosen.rows} rows, {chosen.epochs} epochs, {steps} steps of {GLOBAL_BATCH_ROWS} rows, network of"
        f" width {chosen.width}, 1 thread a worker, AdamW, cosine schedule, clipping: the same on both sides",
        "torchrun DDP: DistributedSampler and DataLoader with one process a worker, PNGs decoded as needed",
        f"Tandem saves every {chosen.every_s:g} s: {median(o.checkpoints for o, _ in found):.0f} checkpoints"
        f" a run (median); it ends {whole_s:.0f} s after the command, with export and evaluation",
    ]
    return finished(report, chosen)


if __name__ == "__main__":
    raise SystemExit(main())
