"""One worker's way through one generation: one state, steps to the end or to an agreed stop, the last commit.

A batch that ruins the weights is gone back behind, and left out. Rank 0 also decides when to save, commits,
and reports.

Knows neither how a group is formed nor what becomes of the worker afterwards.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from cluster.clock import Clock
from cluster.errors import RunFailed, StorageError, TandemError
from cluster.manifest import Manifest, Writer
from cluster.runs import Run
from training.agree import Agreement
from training.checkpoints.saver import Saver, Stage
from training.control import Source
from training.data.dataset import Dataset
from training.data.loader import HostBatch, Loader
from training.data.plan import Plan
from training.flops import tell_flops
from training.line import Line
from training.loop import train_steps
from training.losses import Poisoned
from training.memory import Memory
from training.recipe import Recipe
from training.recorder import AgreedStop, Recorder, Seat
from training.reporter import Reporter
from training.task import Task
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

    run: Run
    recipe: Recipe
    task: Task
    dataset: Dataset
    plan: Plan
    total_steps: int
    device: torch.device
    memory: Memory
    stage: Stage
    telling: Telling
    epoch: int
    """Of the driver's lease."""
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
        self._recipe = kept.recipe
        self._memory = kept.memory
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
        saver = self._saver(reporter)
        control.on_part = saver.close
        recorder = Recorder(self._seat, state, line, agreement, saver, reporter, self._memory.saved_step)
        control.step = state.step
        control.on_joined(state.step, source)
        control.phase = "training"
        try:
            self._steps(recorder, line, saver, reporter)
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
        )
        # Once at the beginning, so that the time of one that is killed soon has a beginning too.
        self._seat.teller.tell(generation=group.generation, rank=group.rank)
        self._events.request_flush()

    def _steps(self, recorder: Recorder, line: Line, saver: Saver, reporter: Reporter | None) -> None:
        """Step to the end, going back behind each batch that ruins the weights and leaving it out."""
        optimization = self._recipe.optimization
        while True:
            state = self._memory.state
            loader = Loader(
                self._kept.dataset,
                self._kept.plan,
                self._kept.task,
                global_batch_size=optimization.global_batch_size,
                rank=self._group.rank,
                world_size=self._group.world,
                cursor=state.cursor,
                epochs=optimization.epochs,
            )
            try:
                with loader as batches:
                    train_steps(
                        self._kept.task,
                        state,
                        self._telling_flops(batches),
                        optimization,
                        total_steps=self._kept.total_steps,
                        device=self._kept.device,
                        hooks=recorder,
                        spike_factor=self._recipe.faults.spike_factor,
                    )
                return
            except Poisoned as poisoned:
                self._go_back(poisoned, line, saver, reporter)

    def _telling_flops(self, batches: Iterable[HostBatch]) -> Iterator[HostBatch]:
        """The batches, of which the first tells rank 0 what a row costs."""
        for number, batch in enumerate(batches):
            if number == 0 and self._group.rank == 0:
                precision = self._recipe.optimization.precision
                tell_flops(self._kept.task, batch.arrays, self._kept.device, precision, self._events)
            yield batch

    def _go_back(self, poisoned: Poisoned, line: Line, saver: Saver, reporter: Reporter | None) -> None:
        allowed = self._recipe.faults.skip_at_most
        if line.left_out >= allowed:
            raise RunFailed(
                f"{poisoned.failed}, and {line.left_out} batches were left out before",
                got=str(poisoned.loss),
                allowed=f"faults.skip_at_most: {allowed}",
                fix="look for extreme values in the data, or start a new run with a lower learning_rate",
            ) from None
        self._seat.account.switch("restart")
        self._control.phase = "restoring"
        with contextlib.suppress(StorageError):  # what is in flight may be the last good one
            saver.wait(self._recipe.checkpoint.retry_s)
        meta = self._memory.go_back(self._group, self._events)
        line.back_to(meta, poisoned.start, poisoned.stop)
        if reporter:
            self._events.write(
                "rolled-back",
                why=poisoned.failed,
                step=poisoned.step,
                to_step=meta.step,
                checkpoint=self._memory.checkpoint,
                rows=[poisoned.start, poisoned.stop],
            )
            reporter.note(
                f"{poisoned.failed}: going back to step {meta.step}, and leaving that step's batch out"
            )
        self._control.phase = "training"

    def _saver(self, reporter: Reporter | None) -> Saver:
        troubles = Troubles(self._events, self._kept.clock)

        def not_committed(error: TandemError) -> None:
            if reporter:
                reporter.not_committed(error)

        def committed(manifest: Manifest) -> None:
            if reporter:
                reporter.committed(manifest)
            self._memory.checkpoint = manifest.number

        return Saver(
            self._kept.run,
            self._memory.state,
            self._recipe.checkpoint,
            rank=self._group.rank,
            world=self._group.world,
            exchange=self._group.client(),
            newest=self._memory.head,
            writer=Writer(epoch=self._kept.epoch, generation=self._group.generation),
            on_commit=committed,
            on_failure=not_committed,
            stage=self._kept.stage,
            on_trouble=troubles.tell,
        )
