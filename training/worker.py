"""One training process's part of a run, through one generation of workers or many. Knows no Ray.

Every worker does the same: agree with the others on one state, read, step, save its share of each
checkpoint. Rank 0 also decides when to save, commits, and reports. Where the state comes from is settled
anew in each generation: from the worker whose memory is furthest ahead, else from the newest whole
checkpoint, else it is fresh. So whoever starts workers, for the first time or the tenth, passes nothing on.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import RunFailed, StorageError, TandemError
from cluster.events import EventWriter
from cluster.manifest import Manifest, Writer
from cluster.runs import Run
from cluster.storage import open_store
from training.agree import Agreement
from training.checkpoints.saver import Saver, Stage
from training.control import Control, Source
from training.data.dataset import Dataset
from training.data.loader import HostBatch, Loader
from training.facts import DatasetFacts
from training.flops import tell_flops
from training.goodput import Account, AccountTeller
from training.group import Group, from_environment
from training.line import Line
from training.loop import train_steps
from training.losses import Poisoned
from training.memory import Memory
from training.progress import Progress
from training.recipe import Recipe
from training.recorder import AgreedStop, Recorder, Seat
from training.reporter import Reporter
from training.tasks import build_task
from training.trackers import openers
from training.tracking import Tracking


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


class Worker:
    """One training process. Make it once, then `train` in one group after another.

    Args:
        facts: of the dataset, as recorded when the run began.
        report: takes rank 0's progress.
        epoch: of the driver's lease.
        member: this process's name among the run's.

    Raises:
        BadInput: the dataset is not the one that the run began with.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_name: str,
        facts: DatasetFacts,
        *,
        report: Callable[[Progress], None],
        epoch: int = 0,
        member: str = "",
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        torch.set_num_threads(max(1, int(recipe.workers.cpus)))
        self._recipe = recipe
        self._report = report
        self._clock = clock
        self._epoch = epoch
        self._member = member or f"pid{os.getpid()}"
        self._run = Run(open_store(recipe.store), run_name)
        self._dataset = Dataset.open(recipe.data.train, disk_bytes=int(recipe.data.cache_gib * 2**30))
        self._dataset.check_unchanged(facts.fingerprint)
        self._facts = facts
        self._task = build_task(recipe.task, facts, recipe.options)
        self._plan = self._dataset.plan(recipe.optimization.seed)
        batch_rows = recipe.optimization.global_batch_size
        self._total_steps = recipe.optimization.epochs * self._plan.steps_per_epoch(batch_rows)
        self._account = Account(clock)
        self._stage = Stage()
        self._tracking: Tracking | None = None
        self._memory = Memory(self._run, recipe, facts.fingerprint, self._task, worker_device(recipe))

    def train(self, group: Group, control: Control) -> Outcome:
        """Take part in a formed group until the last step is committed, or all stop as agreed.

        Whatever is raised, the state after the last finished step is kept for the next group.

        Raises:
            RunFailed: batches ruined the weights more often than the recipe allows.
            TandemError: as `training.loop.train_steps`, `training.checkpoints.checkpoint` and the loader say.
            RuntimeError: from torch, where a peer is gone.
        """
        events = EventWriter(
            self._run.store, self._run.prefix, f"{group.attempt}-rank{group.rank}", self._clock
        )
        teller = AccountTeller(self._account, events, self._member, self._clock)
        seat = Seat(self._recipe, group, control, self._account, teller, events, self._clock)
        self._account.switch("restart")
        ended = False
        try:
            outcome = self._generation(seat)
            ended = not outcome.paused
            return outcome
        finally:
            control.phase, control.waiting = "waiting", False
            self._account.switch("restart")
            teller.tell(generation=group.generation, rank=group.rank, final=ended)
            if ended:
                events.flush()
            else:
                events.request_flush()  # the others wait for this one, and must not wait for the store

    def close(self) -> None:
        """Let go of what outlives groups."""
        self._stage.close()
        if self._tracking is not None:
            self._tracking.close()

    def _generation(self, seat: Seat) -> Outcome:
        group, control, events = seat.group, seat.control, seat.events
        control.phase = "restoring"
        source = self._memory.agree(group, events)
        state, line = self._memory.state, self._memory.line(group)
        events.write(
            "attempt-started",
            attempt=group.attempt,
            generation=group.generation,
            rank=group.rank,
            world=group.world,
            pid=os.getpid(),
            member=self._member,
            source=source,
            checkpoint=self._memory.checkpoint,
            step=state.step,
            cursor=state.cursor,
        )
        # Once at the beginning, so that the time of one that is killed soon has a beginning too.
        seat.teller.tell(generation=group.generation, rank=group.rank)
        events.request_flush()
        reporter = self._reporter(seat, source) if group.rank == 0 else None
        agreement = Agreement(group.client(), group.rank, group.world)
        saver = self._saver(seat, reporter)
        control.on_part = saver.close
        recorder = Recorder(seat, state, line, agreement, saver, reporter, self._memory.saved_step)
        control.step = state.step
        control.on_joined(state.step, source)
        control.phase = "training"
        try:
            self._steps(seat, recorder, line, saver, reporter)
            control.phase = "committing"
            recorder.finish()
            group.meet()
            outcome = Outcome(state.step, reporter.samples_per_s if reporter else 0.0)
        except AgreedStop as stop:
            group.meet()
            outcome = Outcome(state.step, 0.0, paused=True, saved=stop.saved)
        finally:
            recorder.close()
            self._memory.keep(line, events)
            agreement.close()
            saver.close()
        events.write(
            "attempt-paused" if outcome.paused else "attempt-finished",
            attempt=group.attempt,
            rank=group.rank,
            step=state.step,
            cursor=state.cursor,
        )
        return outcome

    def _steps(
        self, seat: Seat, recorder: Recorder, line: Line, saver: Saver, reporter: Reporter | None
    ) -> None:
        """Step to the end, going back behind each batch that ruins the weights and leaving it out."""
        while True:
            state = self._memory.state
            loader = Loader(
                self._dataset,
                self._plan,
                self._task,
                global_batch_size=self._recipe.optimization.global_batch_size,
                rank=seat.group.rank,
                world_size=seat.group.world,
                cursor=state.cursor,
                epochs=self._recipe.optimization.epochs,
            )
            try:
                with loader as batches:
                    train_steps(
                        self._task,
                        state,
                        self._telling_flops(seat, batches),
                        self._recipe.optimization,
                        total_steps=self._total_steps,
                        device=worker_device(self._recipe),
                        hooks=recorder,
                        spike_factor=self._recipe.faults.spike_factor,
                    )
                return
            except Poisoned as poisoned:
                self._go_back(seat, poisoned, line, saver, reporter)

    def _telling_flops(self, seat: Seat, batches: Iterable[HostBatch]) -> Iterator[HostBatch]:
        """The batches, of which the first tells rank 0 what a row costs."""
        for number, batch in enumerate(batches):
            if number == 0 and seat.group.rank == 0:
                precision = self._recipe.optimization.precision
                tell_flops(self._task, batch.arrays, worker_device(self._recipe), precision, seat.events)
            yield batch

    def _go_back(
        self, seat: Seat, poisoned: Poisoned, line: Line, saver: Saver, reporter: Reporter | None
    ) -> None:
        allowed = self._recipe.faults.skip_at_most
        if line.left_out >= allowed:
            raise RunFailed(
                f"{poisoned.failed}, and {line.left_out} batches were left out before",
                got=str(poisoned.loss),
                allowed=f"faults.skip_at_most: {allowed}",
                fix="look for extreme values in the data, or start a new run with a lower learning_rate",
            ) from None
        seat.account.switch("restart")
        seat.control.phase = "restoring"
        with contextlib.suppress(StorageError):  # what is in flight may be the last good one
            saver.wait(self._recipe.checkpoint.retry_s)
        meta = self._memory.go_back(seat.group, seat.events)
        line.back_to(meta, poisoned.start, poisoned.stop)
        if reporter:
            seat.events.write(
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
        seat.control.phase = "training"

    def _saver(self, seat: Seat, reporter: Reporter | None) -> Saver:
        def not_committed(error: TandemError) -> None:
            if reporter:
                reporter.not_committed(error)

        def committed(manifest: Manifest) -> None:
            if reporter:
                reporter.committed(manifest)
            self._memory.checkpoint = manifest.number

        return Saver(
            self._run,
            self._memory.state,
            self._recipe.checkpoint,
            rank=seat.group.rank,
            world=seat.group.world,
            exchange=seat.group.client(),
            newest=self._memory.head,
            writer=Writer(epoch=self._epoch, generation=seat.group.generation),
            on_commit=committed,
            on_failure=not_committed,
            stage=self._stage,
        )

    def _reporter(self, seat: Seat, source: Source) -> Reporter:
        state, recipe = self._memory.state, self._recipe
        note = ""
        if source == "store":
            note = f"resuming from checkpoint {self._memory.checkpoint}, step {state.step}"
        start = Progress(
            "training",
            step=state.step,
            total_steps=self._total_steps,
            epoch=min(state.cursor // self._facts.rows, recipe.optimization.epochs - 1),
            epochs=recipe.optimization.epochs,
            workers=seat.group.world,
            checkpoint=self._memory.checkpoint,
            note=note,
        )
        reporter = Reporter(start, self._tell, seat.events, self._clock)
        if self._tracking is None:
            trackers = openers(self._run, f"{seat.group.attempt}-rank0")
            self._tracking = Tracking(trackers, reporter.note, self._clock)
        return reporter

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


def worker_device(recipe: Recipe) -> torch.device:
    """What this process's steps run on."""
    return torch.device("cuda", torch.cuda.current_device()) if recipe.workers.gpus else torch.device("cpu")


def run_worker(
    recipe: Recipe,
    run_name: str,
    facts: DatasetFacts,
    *,
    report: Callable[[Progress], None],
    clock: Clock = SYSTEM_CLOCK,
) -> Outcome:
    """Train alone, or in the group that `training.group.from_environment` formed, to the last commit.

    Raises:
        TandemError: as `Worker.train`.
    """
    worker = Worker(recipe, run_name, facts, report=report, clock=clock)
    try:
        with from_environment(worker_device(recipe), clock) as group:
            return worker.train(group, Control())
    finally:
        worker.close()
