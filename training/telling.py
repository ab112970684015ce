"""What a worker tells: rank 0 its driver and the trackers, which outlive groups; every rank of its store.

Knows nothing of where it goes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cluster.clock import Clock
from cluster.errors import TandemError
from cluster.events import EventWriter
from cluster.runs import Run
from training.control import Source
from training.facts import DatasetFacts
from training.goodput import Account
from training.method import Position
from training.progress import Progress
from training.recipe import Recipe
from training.recorder import Seat
from training.reporter import Reporter
from training.trackers import openers
from training.tracking import Tracking

TROUBLES_EVERY_S = 60.0


class Telling:
    """One worker's; it stays silent until the worker is rank 0.

    Args:
        report: takes progress.
        account: of the worker's time, told with its progress.
        total_steps: of the whole run.
    """

    def __init__(
        self,
        run: Run,
        recipe: Recipe,
        facts: DatasetFacts,
        report: Callable[[Progress], None],
        account: Account,
        total_steps: int,
        clock: Clock,
    ) -> None:
        self._run = run
        self._recipe = recipe
        self._facts = facts
        self._report = report
        self._account = account
        self._total_steps = total_steps
        self._clock = clock
        self._tracking: Tracking | None = None

    def reporter(self, seat: Seat, state: Position, source: Source, checkpoint: int) -> Reporter:
        """For one generation, which begins with `state`; `checkpoint` is the newest one, 0 for none."""
        epochs = self._recipe.optimization.epochs
        restored = f"resuming from checkpoint {checkpoint}, step {state.step}"
        start = Progress(
            "training",
            step=state.step,
            total_steps=self._total_steps,
            epoch=min(state.cursor // self._facts.rows, epochs - 1),
            epochs=epochs,
            workers=seat.group.world,
            checkpoint=checkpoint,
            note=restored if source == "store" else "",
        )
        reporter = Reporter(start, self._tell, seat.events, self._clock)
        if self._tracking is None:
            trackers = openers(self._run, f"{seat.group.attempt}-rank0")
            self._tracking = Tracking(trackers, reporter.note, self._clock)
        return reporter

    def close(self) -> None:
        """Let the trackers have what is left. The run's result is told to them by whoever makes it."""
        if self._tracking is not None:
            self._tracking.close()

    def _tell(self, progress: Progress) -> None:
        seconds = {str(kind): round(value, 3) for kind, value in self._account.totals().items() if value}
        self._report(replace(progress, accounts={self._account.nonce: seconds}))
        if self._tracking is not None and progress.step:
            self._tracking.log(
                progress.step,
                **{
                    "loss": progress.loss,
                    "samples per s": progress.samples_per_s,
                    "data wait": progress.data_wait_share,
                    "epoch": float(progress.epoch),
                    "workers": float(progress.workers),
                },
            )


class Troubles:
    """Events of a store that fails while a checkpoint is put into it, and is tried again: some of them."""

    def __init__(self, events: EventWriter, clock: Clock) -> None:
        self._events = events
        self._clock = clock
        self._told_s: float | None = None

    def tell(self, error: TandemError) -> None:
        """Record a failure, at most one a minute. From any thread; of two at once both may be told."""
        now_s = self._clock.monotonic_s()
        if self._told_s is None or now_s - self._told_s >= TROUBLES_EVERY_S:
            self._told_s = now_s
            self._events.write("checkpoint-delayed", why=error.failed, got=error.got)
