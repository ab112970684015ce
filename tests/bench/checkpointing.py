"""What a save of about 1.2 GB costs training: Tandem, Ray Train, torch's distributed checkpoint.

All ways take their turns in one training of two gloo workers on one machine (trainers/saving.py), so a
pair is the same state, processes and disk, seconds apart. Blocking is the slowest rank's time in the call;
lost is that, and what the steps took longer than quiet ones until the state was stored.

    python -m tests.bench.checkpointing [--pairs 5] [--out FILE] [--s3 1]

With `--s3 1` only Tandem takes turns, and saves to an S3 server (SeaweedFS) on the same cores.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from tests.bench.asked import asked, finished
from tests.bench.commands import running_command
from tests.bench.machine import distributions, machine_facts, use_cores
from tests.bench.pairs import Comparison, Measure, Report
from tests.bench.warm_cluster import warm_cluster
from tests.seaweed import Seaweed

CORES = 2
ENDS_WITHIN_S = 1800
OURS = "tandem"
RAY = ("ray-rank-0", "ray-shards")
DCP = ("dcp-thread", "dcp-process")
NAMES = {
    "ray-rank-0": "Ray Train, rank 0 saves all",
    "ray-shards": "Ray Train, each rank its share",
    "dcp-thread": "torch DCP async, thread",
    "dcp-process": "torch DCP async, process",
}
MINUTE_S = 60.0


@dataclass(frozen=True)
class Turn:
    """One save of one way."""

    blocked_s: float
    stored_s: float
    quiet_s: tuple[float, ...]
    upload_s: tuple[float, ...]

    @property
    def lost_s(self) -> float:
        """Of training: blocked, and steps that took longer than the quiet ones just before."""
        usual_s = median(self.quiet_s)
        return self.blocked_s + sum(step_s - usual_s for step_s in self.upload_s)

    @property
    def p95_upload_s(self) -> float:
        """Of the steps until it was stored."""
        return float(np.percentile(self.upload_s, 95))

    @property
    def p95_quiet_s(self) -> float:
        """Of the steps just before: how much they differ by themselves."""
        return float(np.percentile(self.quiet_s, 95))


def measured(folder: Path, pairs: int, on_s3: bool) -> dict[str, list[Turn]]:
    """Every way's turns, in order of rounds; Tandem's only where it saves to S3."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(Seaweed()) if on_s3 else None
        keys = server.env if server is not None else None
        cluster = stack.enter_context(warm_cluster(folder, num_cpus=CORES, variables=keys))
        command = [sys.executable, "-m", "tests.bench.trainers.saving", "--address", cluster.address]
        command += ["--folder", str(folder / "saves"), "--rounds", str(pairs)]
        if server is not None:
            command += ["--ways", OURS, "--store", server.uri(server.BUCKET, "bench")]
        with running_command(command, cluster.variables) as running:
            turns = running.result(ENDS_WITHIN_S)["turns"]
    found: dict[str, list[Turn]] = defaultdict(list)
    for turn in sorted(turns, key=lambda turn: turn["round"]):
        times = (tuple(turn["quiet_s"]), tuple(turn["upload_s"]))
        found[turn["way"]].append(Turn(turn["blocked_s"], turn["stored_s"], *times))
    return found


def compare(turns: dict[str, list[Turn]], report: Report) -> None:
    """Ours beside each way, and the figures that stand for themselves."""

    def add(figure: str, of: Callable[[Turn], float], peer: str, at_most: float | None) -> None:
        values = tuple((of(a), of(b)) for a, b in zip(turns[OURS], turns[peer], strict=True))
        report.comparisons.append(Comparison(figure, "Tandem", NAMES[peer], values, at_most=at_most))

    if len(turns) > 1:
        compare_peers(turns, add)
    disturbed = tuple((turn.p95_upload_s, median(turn.quiet_s)) for turn in turns[OURS])
    report.comparisons.append(
        Comparison("s a step: p95 during upload", "Tandem", "a quiet step", disturbed, at_most=1.2)
    )
    noise = tuple((turn.p95_quiet_s, median(turn.quiet_s)) for turn in turns[OURS])
    report.comparisons.append(Comparison("s a step: p95 of quiet ones", "Tandem", "a quiet step", noise))
    for peer in DCP if len(turns) > 1 else ():
        values = tuple((turn.p95_upload_s, median(turn.quiet_s)) for turn in turns[peer])
        report.comparisons.append(Comparison("(the same of the peer)", NAMES[peer], "a quiet step", values))
    for way, name in [(OURS, "Tandem"), *NAMES.items()]:
        if way in turns:
            shares = tuple(100 * turn.lost_s / MINUTE_S for turn in turns[way])
            limit = 1.0 if way == OURS else None
            report.measures.append(Measure(f"% of time lost, a save a minute: {name}", shares, limit))
    report.measures.append(Measure("until stored, s: Tandem", tuple(turn.stored_s for turn in turns[OURS])))


Add = Callable[[str, Callable[[Turn], float], str, float | None], None]


def compare_peers(turns: dict[str, list[Turn]], add: Add) -> None:
    """Ours beside each way: what a save costs."""
    for peer in RAY:
        add("blocked, s a save", lambda turn: turn.blocked_s, peer, 0.1)
    best = min(DCP, key=lambda way: median(turn.blocked_s for turn in turns[way]))
    for peer in DCP:
        add("blocked, s a save", lambda turn: turn.blocked_s, peer, 0.7 if peer == best else None)
    for peer in (*RAY, *DCP):
        add("lost, s a save", lambda turn: turn.lost_s, peer, None)
    for peer in DCP:
        add("until stored, s", lambda turn: turn.stored_s, peer, None)


def main() -> int:
    chosen = asked(__doc__, s3=(int, 0, "1: save to an S3 server on this machine"))
    use_cores(CORES)
    report = Report(
        "Saving about 1.2 GB of state, 2 workers",
        machine_facts(),
        {"both": distributions("tandem-ray", "ray", "torch")},
    )
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        turns = measured(Path(name), chosen.pairs, bool(chosen.s3))
    compare(turns, report)
    quiet_s = median(step for way in turns.values() for turn in way for step in turn.quiet_s)
    report.notes += [
        f"100.7 million fp32 parameters, AdamW: 1.21 GB; a quiet step takes {quiet_s:.2f} s (median)",
        "an S3 server (SeaweedFS) on the same cores"
        if chosen.s3
        else "all ways in one training, each in turn; every first save is not counted; a local folder",
        "torch DCP: buffers used again, a group of its own, files synced to the disk, as ours are",
        "lost: blocked, and what the steps until it was stored took longer than the six before",
    ]
    return finished(report, chosen)


if __name__ == "__main__":
    raise SystemExit(main())
