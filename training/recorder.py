"""What a worker does between its steps: save when that was agreed, stop when that was agreed, keep account.

Rank 0 also sees when a checkpoint is due, or a stop is asked for, and proposes it to the others
(training.agree).

Knows neither how state becomes files (training.checkpoints) nor what people are told (training.reporter).
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass

from torch.nn.parallel import DistributedDataParallel

from cluster.clock import Clock
from cluster.errors import StorageError
from cluster.events import EventWriter
from cluster.goodput import Kind
from training.agree import Agreement
from training.checkpoints.pace import SaveClock
from training.communication import ExposedExchange
from training.control import Control
from training.goodput import Account, AccountTeller
from training.group import Group
from training.line import Line
from training.loop import StepReport
from training.method import Position, Saving
from training.recipe import Recipe
from training.reporter import Reporter

_SAVE, _PAUSE, _SAVE_AND_PAUSE = "save", "pause", "save-and-pause"


class AgreedStop(Exception):
    """All ranks stop after the same step; the state is that step's."""

    def __init__(self, saved: bool) -> None:
        super().__init__("stopped as agreed")
        self.saved = saved


@dataclass(frozen=True, slots=True)
class Seat:
    """What one worker's recorder and its helpers share in one generation."""

    recipe: Recipe
    group: Group
    control: Control
    account: Account
    teller: AccountTeller
    events: EventWriter
    clock: Clock


class Recorder:
    """The hooks of one worker's loop in one generation (`training.loop.Hooks`).

    Args:
        reporter: rank 0's.
        saved_step: of the newest checkpoint on the line, -1 for none.
    """

    def __init__(
        self,
        seat: Seat,
        state: Position,
        line: Line,
        agreement: Agreement,
        saver: Saving,
        reporter: Reporter | None,
        saved_step: int,
    ) -> None:
        self._seat = seat
        self._state = state
        self._line = line
        self._agreement = agreement
        self._saver = saver
        self._reporter = reporter
        self._exchange = ExposedExchange(seat.account, seat.clock)
        self._due = SaveClock(
            seat.recipe.checkpoint, state.step, max(0, seat.group.generation - 1), seat.clock
        )
        self._losses: list[float] = []
        self._saved_step = saved_step

    def is_skipped(self, cursor: int) -> bool:
        return self._line.is_skipped(cursor)

    def is_due(self, step: int) -> bool:
        return self._agreement.is_due(step)

    def switch(self, kind: Kind) -> None:
        self._seat.account.switch(kind)

    def begin_step(self, step: int) -> None:
        self._seat.account.begin_step(step)
        self._seat.control.progress += 1

    def on_wrapped(self, model: DistributedDataParallel) -> None:
        self._exchange.watch(model)

    def on_forward(self) -> None:
        control = self._seat.control
        control.progress += 1
        control.waiting = self._seat.group.world > 1

    def on_backward(self) -> None:
        self._exchange.finished()

    def on_step(self, step: StepReport) -> None:
        """Raises AgreedStop, and whatever the saver raises."""
        control = self._seat.control
        control.step, control.waiting = step.step, False
        control.progress += 1
        if not step.skipped:
            self._saver.stepped(step.step_s)
        if step.skipped and self._reporter:
            self._seat.events.write("batch-skipped", step=step.step, cursor=step.cursor)
        if step.loss is not None:
            self._losses.append(step.loss)
        agreed = self._agreement.take(step.step)
        if agreed in (_SAVE, _SAVE_AND_PAUSE):
            self.save()
        if agreed == _SAVE_AND_PAUSE:
            with self._seat.account.during("save"):
                control.phase = "saving"
                self._saver.wait(self._seat.recipe.checkpoint.retry_s)
        if self._reporter:
            self._reporter.on_step(step)
        self._seat.teller.tell_if_due(generation=self._seat.group.generation, rank=self._seat.group.rank)
        if agreed in (_PAUSE, _SAVE_AND_PAUSE):
            raise AgreedStop(saved=agreed == _SAVE_AND_PAUSE)
        if self._seat.group.rank == 0:
            self._propose(step.step)

    def save(self) -> None:
        """Commit the state as it is, while training goes on."""
        with self._seat.account.during("save"):
            loss = math.fsum(self._losses) / len(self._losses) if self._losses else None
            self._saver.save(self._line.to(self._state, loss))
        self._losses.clear()
        self._saved_step = self._state.step
        self._due.saved(self._state.step, self._saver.last_blocking_s, self._saver.last_upload_s)

    def finish(self) -> None:
        """Commit the last state, unless it is what was restored, and wait until it stands."""
        if self._reporter:
            self._reporter.say("committing")
        with self._seat.account.during("save"):
            patience_s = self._seat.recipe.checkpoint.retry_s
            if self._saved_step != self._state.step:
                self._settle(patience_s)
                self.save()
            self._saver.wait(patience_s)

    def _settle(self, patience_s: float) -> None:
        """Let an earlier save end, one way or the other; the last one makes up for it."""
        with contextlib.suppress(StorageError):
            self._saver.wait(patience_s)

    def close(self) -> None:
        """The generation is over: leave nothing of it at the model."""
        self._exchange.unwatch()

    def _propose(self, step: int) -> None:
        """Before the next step, tell every rank what to do after it."""
        control = self._seat.control
        if control.pause:
            if not control.pause_saves:
                self._agreement.propose(_PAUSE, step + 1)
            elif not self._saver.busy:
                self._agreement.propose(_SAVE_AND_PAUSE, step + 1)
        elif self._due.is_due(step + 1) and not self._saver.busy:
            self._agreement.propose(_SAVE, step + 1)
