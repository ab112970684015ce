"""How far a run is: what rank 0 reports, and how a person is shown it.

On a terminal a bar that moves; piped, a plain line every few seconds. Always on stderr, because
stdout belongs to the result. Knows nothing of how reports travel (training.trainer).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from cluster.clock import SYSTEM_CLOCK, Clock

PLAIN_LINE_EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands. `phase` says what is being done when steps aren't."""

    phase: str
    step: int = 0
    total_steps: int = 0
    epoch: int = 0
    epochs: int = 0
    loss: float | None = None
    samples_per_s: float = 0.0
    """Rows a second over all workers, since the last report."""
    data_wait_share: float = 0.0
    """Part of the time that rank 0 waited for data, 0 to 1."""
    workers: int = 0
    eta_s: float | None = None
    checkpoint: int = 0
    """Number of the newest checkpoint, 0 before the first."""
    accounts: dict[str, dict[str, float]] = field(default_factory=dict)
    """Seconds by kind (training.goodput) of the process that reports, under its account's name."""
    note: str = ""
    """Something worth a line of its own, such as a recovery."""

    def line(self) -> str:
        """One plain line."""
        if not self.total_steps:
            return self.phase
        loss = "" if self.loss is None else f"  loss {self.loss:.4f}"
        eta = "" if self.eta_s is None else f"  ETA {_duration(self.eta_s)}"
        return (
            f"step {self.step}/{self.total_steps}  epoch {self.epoch + 1}/{self.epochs}{loss}"
            f"  {self.samples_per_s:,.0f} samples/s{eta}  checkpoint {self.checkpoint}"
        )


Show = Callable[[Progress], None]


@contextmanager
def display(stream: TextIO | None = None, clock: Clock = SYSTEM_CLOCK) -> Iterator[Show]:
    """A `Show` fit for `stream` (stderr): a bar on a terminal, plain lines elsewhere."""
    stream = stream or sys.stderr
    if stream.isatty():
        with _bar(stream) as show:
            yield show
    else:
        yield _plain(stream, clock)


def _plain(stream: TextIO, clock: Clock) -> Show:
    last_s: float | None = None
    last_phase = ""

    def show(progress: Progress) -> None:
        nonlocal last_s, last_phase
        now_s = clock.monotonic_s()
        if progress.note:
            print(progress.note, file=stream, flush=True)
        new_phase = progress.phase != last_phase
        done = bool(progress.total_steps) and progress.step == progress.total_steps
        if new_phase or done or last_s is None or now_s - last_s >= PLAIN_LINE_EVERY_S:
            print(progress.line(), file=stream, flush=True)
            last_s, last_phase = now_s, progress.phase

    return show


@contextmanager
def _bar(stream: TextIO) -> Iterator[Show]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(file=stream), transient=False) as bar:
        task = bar.add_task("starting", total=None, facts="")

        def show(progress: Progress) -> None:
            if progress.note:
                bar.console.print(progress.note)
            loss = "" if progress.loss is None else f"loss {progress.loss:.4f}  "
            facts = f"{loss}{progress.samples_per_s:,.0f} samples/s" if progress.step else ""
            bar.update(
                task,
                description=progress.phase,
                completed=progress.step,
                total=progress.total_steps or None,
                facts=facts,
            )

        yield show


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
