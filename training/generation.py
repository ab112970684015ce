"""One worker's way through one generation: one state, steps to the end or to an agreed stop, the last commit.

How steps are made is the method's business (`training.method`). Rank 0 also decides when to save, commits,
and reports.

Knows neither how a group is formed nor what becomes of the worker afterwards.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from cluster.clock import Clock
from cluster.errors import TandemError
from cluster.manifest import Manifest
from training.agree import Agreement
from training.control import Source
from training.method import Heard, Method
from training.recorder import AgreedStop, Recorder, Seat
from training.reporter import Reporter
from training.telling import Telling, Troubles


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a generation ended for one worker."""

    steps: int
    samples_per_s: float
    """Rows a second over all workers, from the end of the generation's first step; known to rank 0."""
    paused: bool = False
    """Whether all stopped as agreed, before the end."""
    saved: bool = False
    """Whether the step at which they stopped is committed."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What a worker has in every generation."""

    method: Method[Any]
    telling: Telling
    member: str
    clock: Clock


class Generation:
    """One worker's part in one group.

    Args:
        kept: what the worker brings along.
        seat: its place in this group.
    """

    def __init__(self, kept: Kept, seat: Seat) -> None:
        self._kept = kept
        self._seat = seat
        self._method = kept.method
        self._memory = kept.method.memory
        self._group, self._control, self._events = seat.group, seat.control, seat.events

    def take_part(self) -> Outcome:
        """Until the last step is committed, or all stop as agreed. Memory is left ready for the next group.

        Raises:
            As `training.worker.Worker.train`.
        """
        group, control = self._group, self._control
        control.phase = "restoring"
        source = self._memory.agree(group, self._events)
        state, line = self._memory.state, self._memory.line(group)
        self._tell_start(source)
        reporter = None
        if group.rank == 0:
            reporter = self._kept.telling.reporter(self._seat, state, source, self._memory.checkpoint)
        agreement = Agreement(group.client(), group.rank, group.world)
        saver = self._method.saver(self._seat, self._heard(reporter))
        control.on_part = saver.close
        recorder = Recorder(self._seat, state, line, agreement, saver, reporter, self._memory.saved_step)
        control.step = state.step
        control.on_joined(state.step, source)
        control.phase = "training"
        try:
            self._method.train(self._seat, line, recorder, saver, reporter)
            control.phase = "committing"
            recorder.finish()
            group.meet()
            outcome = Outcome(state.step, reporter.samples_per_s if reporter else 0.0)
        except AgreedStop as stop:
            group.meet()
            outcome = Outcome(state.step, 0.0, paused=True, saved=stop.saved)
        finally:
            recorder.close()
            self._memory.keep(line, self._events)
            agreement.close()
            saver.close()
        self._events.write(
            "attempt-paused" if outcome.paused else "attempt-finished",
            attempt=group.attempt,
            rank=group.rank,
            step=state.step,
            cursor=state.cursor,
        )
        return outcome

    def _tell_start(self, source: Source) -> None:
        group, state = self._group, self._memory.state
        self._events.write(
            "attempt-started",
            attempt=group.attempt,
            generation=group.generation,
            rank=group.rank,
            world=group.world,
            pid=os.getpid(),
            member=self._kept.member,
            source=source,
            checkpoint=self._memory.checkpoint,
            step=state.step,
            cursor=state.cursor,
            total_steps=self._method.total_steps,
        )
        # Once at the beginning, so that the time of one that is killed soon has a beginning too.
        self._seat.teller.tell(generation=group.generation, rank=group.rank)
        self._events.request_flush()

    def _heard(self, reporter: Reporter | None) -> Heard:
        troubles = Troubles(self._events, self._kept.clock)

        def gave_up(error: TandemError) -> None:
            if reporter:
                reporter.not_committed(error)

        def committed(manifest: Manifest) -> None:
            if reporter:
                reporter.committed(manifest)
            self._memory.checkpoint = manifest.number

        return Heard(committed, gave_up, troubles.tell)
