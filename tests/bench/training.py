"""`make bench-training`: samples a second with two workers, Tandem beside plain torchrun.

Each pair runs `tandem train` and the same training by hand (`torchrun_ddp.py`) on the same data, one
after the other, on the same two cores. Steady speed is counted from the end of the first step to the
end of the last; the time to the end of the first step, from the moment the command was given.

    python -m tests.bench.training [--pairs 5] [--rows 16384] [--width 32] [--out FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rich.console import Console

from cluster.events import read_events
from cluster.runs import Run
from cluster.storage import open_store
from tests.bench.images import write_images
from tests.bench.machine import REPO, distributions, machine_facts, use_cores
from tests.bench.pairs import PAIRS, Comparison, Report, in_turn

WORKERS = 2
GLOBAL_BATCH_ROWS = 256
EVAL_ROWS = 512
ENDS_WITHIN_S = 300
AIM = 0.97
BIN = Path(sys.executable).parent


class RunBroken(Exception):
    """A run that failed; the text holds the end of what it said."""


@dataclass(frozen=True)
class Speed:
    """One run."""

    samples_per_s: float
    first_step_s: float
    whole_s: float


def tandem(recipe: Path, folder: Path, number: int) -> Speed:
    """`tandem train` on the recipe, from command to exit."""
    name = f"bench-{number}"
    state = {"TANDEM_STATE_DIR": str(folder / "state")}
    started_at, started_s = datetime.now(UTC), time.monotonic()
    result = _last_line([str(BIN / "tandem"), "train", str(recipe), f"run={name}", "--json"], state)
    whole_s = time.monotonic() - started_s
    # Losses are reported every few steps; at the steady speed, the first step ended so long before.
    run = Run(open_store(str(folder / "store")), name)
    report = next(event for event in read_events(run.store, run.prefix) if event["event"] == "step")
    since_first_s = (report["step"] - 1) * GLOBAL_BATCH_ROWS / result["samples_per_s"]
    first_at = datetime.fromisoformat(report["at"]) - timedelta(seconds=since_first_s)
    return Speed(result["samples_per_s"], (first_at - started_at).total_seconds(), whole_s)


def torchrun(recipe: Path) -> Speed:
    """The same by hand, from command to exit."""
    command = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", str(WORKERS)]
    command += ["-m", "tests.bench.torchrun_ddp", str(recipe)]
    started_at, started_s = datetime.now(UTC), time.monotonic()
    result = _last_line(command, {"OMP_NUM_THREADS": "1"})
    first_at = datetime.fromisoformat(result["first_step_at"])
    return Speed(
        result["samples_per_s"], (first_at - started_at).total_seconds(), time.monotonic() - started_s
    )


def _last_line(command: list[str], variables: dict[str, str]) -> dict[str, Any]:
    """The JSON object on the last line that a command writes to stdout."""
    done = subprocess.run(
        command,
        cwd=REPO,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=ENDS_WITHIN_S,
    )
    if done.returncode != 0:
        raise RunBroken(f"{' '.join(command)} ended with {done.returncode}\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def write_recipe(folder: Path, rows: int, epochs: int, width: int) -> Path:
    """Data, and the recipe that both sides read."""
    recipe = {
        "model": "bench",
        "task": "image-classification",
        "options": {"width": width},
        "data": {
            "train": str(write_images(folder / "train", rows, seed=1)),
            "eval": str(write_images(folder / "eval", EVAL_ROWS, seed=2)),
        },
        "store": str(folder / "store"),
        "workers": {"min": WORKERS, "max": WORKERS, "cpus": 1},
        "optimization": {"global_batch_size": GLOBAL_BATCH_ROWS, "epochs": epochs},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def bench(pairs: int, rows: int, epochs: int, width: int, report: Report) -> None:
    """All pairs; what they gave goes into the report."""
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        folder = Path(name)
        recipe = write_recipe(folder, rows, epochs, width)
        numbers = itertools.count(1)
        found = in_turn(
            lambda: tandem(recipe, folder, next(numbers)),
            lambda: torchrun(recipe),
            pairs,
        )
    rates = tuple((ours.samples_per_s, by_hand.samples_per_s) for ours, by_hand in found)
    report.comparisons.append(Comparison("samples/s, steady", "tandem train", "torchrun DDP", rates, AIM))
    firsts = tuple((ours.first_step_s, by_hand.first_step_s) for ours, by_hand in found)
    report.comparisons.append(Comparison("s to the first step", "tandem train", "torchrun DDP", firsts))
    steps = epochs * (rows // GLOBAL_BATCH_ROWS)
    whole_s = median(ours.whole_s for ours, _ in found)
    report.notes += [
        f"{rows} rows, {epochs} epochs, {steps} steps of {GLOBAL_BATCH_ROWS} rows, network of width {width},"
        " 1 thread a worker, AdamW, cosine schedule, clipping: the same on both sides",
        "torchrun DDP: DistributedSampler and DataLoader with one process a worker, PNGs decoded as needed",
        f"tandem train ends {whole_s:.0f} s after the command (median),"
        " with checkpoint, export and evaluation",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--rows", type=int, default=16_384, help=f"a multiple of {GLOBAL_BATCH_ROWS}")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--width", type=int, default=32, help="of the network")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    chosen = parser.parse_args()
    if chosen.rows % GLOBAL_BATCH_ROWS:
        parser.error(f"--rows must be a multiple of {GLOBAL_BATCH_ROWS}: torch's sampler would repeat rows")
    console = Console(width=160)
    use_cores(WORKERS)
    versions = distributions("tandem-ray", "ray", "torch")
    report = Report(
        "Training, image classification, 2 data-parallel workers", machine_facts(), {"both": versions}
    )
    bench(chosen.pairs, chosen.rows, chosen.epochs, chosen.width, report)
    report.show(console)
    if chosen.out:
        report.write(chosen.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
