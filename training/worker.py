"""One data-parallel worker from start to end: restore, read, step, commit. Knows no Ray.

Every worker does the same; rank 0 also commits checkpoints and reports. A worker that starts, for
the first time or the tenth, reads the newest whole checkpoint of its run and goes on from its
cursor, so whoever restarts workers needs to pass nothing on.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import TandemError
from cluster.events import EventWriter
from cluster.manifest import Manifest
from cluster.runs import Run
from cluster.storage import open_store
from training.checkpoint import (
    CheckpointMeta,
    CheckpointWriter,
    Restored,
    is_finite,
    load_state,
    restore,
    state_files,
)
from training.dataset import Dataset
from training.facts import DatasetFacts
from training.loader import Loader
from training.loop import StepReport, TrainState, new_state, train_steps
from training.progress import Progress
from training.recipe import Recipe
from training.tasks import build_task

REPORT_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Outcome:
    """What rank 0 knows at the end."""

    steps: int
    samples_per_s: float
    """Rows a second over all workers, from the end of this attempt's first step; 0 if it had no other."""


def run_worker(
    recipe: Recipe,
    run_name: str,
    facts: DatasetFacts,
    *,
    report: Callable[[Progress], None],
    clock: Clock = SYSTEM_CLOCK,
) -> Outcome:
    """Train until the last step is committed. Call it inside a process group, or alone.

    Raises:
        TandemError: as `training.loop.train_steps`, `training.checkpoint` and the loader say.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    torch.set_num_threads(max(1, int(recipe.workers.cpus)))
    device = torch.device("cuda", torch.cuda.current_device()) if recipe.workers.gpus else torch.device("cpu")
    optimization = recipe.optimization

    run = Run(open_store(recipe.store), run_name)
    dataset = Dataset.open(recipe.data.train)
    dataset.check_unchanged(facts.fingerprint)
    task = build_task(recipe.task, facts, recipe.options)
    plan = dataset.plan(optimization.seed)
    total_steps = optimization.epochs * plan.steps_per_epoch(optimization.global_batch_size)
    state = new_state(task, optimization, device)

    attempt = f"{clock.wall():%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
    events = EventWriter(run.store, run.prefix, f"{attempt}-rank{rank}", clock)
    restored = _restore_together(state, run, facts.fingerprint, rank, device, events)
    events.write(
        "attempt-started",
        attempt=attempt,
        rank=rank,
        world=world,
        pid=os.getpid(),
        checkpoint=restored.number,
        step=state.step,
        cursor=state.cursor,
    )
    events.flush()
    loader = Loader(
        dataset,
        plan,
        task,
        global_batch_size=optimization.global_batch_size,
        rank=rank,
        world_size=world,
        cursor=state.cursor,
        epochs=optimization.epochs,
    )
    recorder = (
        _Recorder(
            recipe, run, state, restored, attempt, world, total_steps, facts.rows, report, events, clock
        )
        if rank == 0
        else None
    )
    with loader as batches:
        train_steps(
            task,
            state,
            batches,
            optimization,
            total_steps=total_steps,
            device=device,
            on_step=recorder.on_step if recorder else _ignore,
        )
    if recorder:
        recorder.finish()
    events.write("attempt-finished", attempt=attempt, rank=rank, step=state.step, cursor=state.cursor)
    events.flush()
    return Outcome(state.step, recorder.samples_per_s if recorder else 0.0)


def _ignore(_: StepReport) -> None:
    """Ranks other than 0 have nothing to record."""


def _restore_together(
    state: TrainState, run: Run, fingerprint: str, rank: int, device: torch.device, events: EventWriter
) -> Restored:
    """Every rank loads the checkpoint that rank 0 found to be the newest whole one."""
    artifacts = run.checkpoints()
    fresh = Restored(0, 0, CheckpointMeta(step=0, cursor=0, fingerprint=fingerprint, ledger=()))
    found = None
    if rank == 0:

        def on_damage(number: int, error: Exception) -> None:
            events.write("checkpoint-passed-over", checkpoint=number, why=str(error))

        found = restore(state, artifacts, on_damage)
    chosen = torch.tensor(found.number if found else 0, device=device)
    if dist.is_initialized():
        dist.broadcast(chosen, 0)
    number = int(chosen)
    if number == 0 or found is not None:
        return found or fresh
    manifest = artifacts.read(number)
    meta = CheckpointMeta.model_validate(manifest.meta)
    load_state(state, meta, lambda name: artifacts.read_file(manifest, name))
    return Restored(number, number, meta)


class _Recorder:
    """What rank 0 does after each step: commit when it is time, report what is worth reporting."""

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        state: TrainState,
        restored: Restored,
        attempt: str,
        world: int,
        total_steps: int,
        rows: int,
        report: Callable[[Progress], None],
        events: EventWriter,
        clock: Clock,
    ) -> None:
        self._policy = recipe.checkpoint
        self._state = state
        self._meta = restored.meta
        self._attempt = attempt
        self._world = world
        self._report = report
        self._events = events
        self._clock = clock
        self._writer = CheckpointWriter(
            run,
            newest=restored.head,
            keep=self._policy.keep,
            on_commit=self._committed,
            on_failure=self._not_committed,
        )
        now_s = clock.monotonic_s()
        self._saved_s = self._reported_s = now_s
        self._saved_step = state.step
        self._window_rows = 0
        self._window_s = self._window_wait_s = 0.0
        self._first: tuple[int, float] | None = None
        self._progress = Progress(
            "training",
            step=state.step,
            total_steps=total_steps,
            epoch=min(state.cursor // rows, recipe.optimization.epochs - 1),
            epochs=recipe.optimization.epochs,
            workers=world,
            checkpoint=restored.number,
            note=f"resuming from checkpoint {restored.number}, step {state.step}" if restored.number else "",
        )
        self._newest = restored.number
        self.samples_per_s = 0.0
        report(self._progress)
        self._progress = replace(self._progress, note="")

    def on_step(self, step: StepReport) -> None:
        now_s = self._clock.monotonic_s()
        self._window_rows += step.global_rows
        self._window_s += step.step_s
        self._window_wait_s += step.data_wait_s
        if self._first is None:
            self._first = (step.cursor, now_s)
        elif now_s > self._first[1]:
            self.samples_per_s = (step.cursor - self._first[0]) / (now_s - self._first[1])
        # A state that is no longer finite must not push the last good checkpoints out.
        if self._due(now_s) and not self._writer.busy and is_finite(self._state):
            self._saved_s, self._saved_step = now_s, step.step
            self._writer.submit(state_files(self._state), self._next_meta())
        if step.loss is not None:
            self._progress = replace(self._progress, loss=step.loss)
            self._events.write("step", step=step.step, epoch=step.epoch, loss=step.loss)
        if now_s - self._reported_s >= REPORT_EVERY_S or step.step == self._progress.total_steps:
            self._say(step, now_s)

    def finish(self) -> None:
        """Commit the last state, unless it is what was restored."""
        if self._state.step == self._meta.step:
            self._writer.close()
            return
        self._report(replace(self._progress, phase="committing"))
        self._writer.finish(state_files(self._state), self._next_meta())

    def _due(self, now_s: float) -> bool:
        policy = self._policy
        by_time = isinstance(policy.every_s, float | int) and now_s - self._saved_s >= policy.every_s
        by_step = policy.every_steps is not None and self._state.step - self._saved_step >= policy.every_steps
        return by_time or by_step

    def _next_meta(self) -> CheckpointMeta:
        return self._meta.extended(
            step=self._state.step, cursor=self._state.cursor, attempt=self._attempt, workers=self._world
        )

    def _say(self, step: StepReport, now_s: float) -> None:
        rate = self._window_rows / max(self._window_s, 1e-9)
        left = self._progress.total_steps - step.step
        self._progress = replace(
            self._progress,
            step=step.step,
            epoch=step.epoch,
            samples_per_s=rate,
            data_wait_share=self._window_wait_s / max(self._window_s, 1e-9),
            eta_s=left * step.global_rows / max(rate, 1e-9),
            checkpoint=self._newest,
        )
        self._report(self._progress)
        self._reported_s = now_s
        self._window_rows, self._window_s, self._window_wait_s = 0, 0.0, 0.0

    def _committed(self, manifest: Manifest) -> None:
        # Called from the writer's thread, so it touches nothing that `on_step` changes.
        meta = CheckpointMeta.model_validate(manifest.meta)
        self._events.write(
            "checkpoint-committed", checkpoint=manifest.number, step=meta.step, cursor=meta.cursor
        )
        self._newest = manifest.number
        self._events.flush()  # so that a run that is killed has told of every checkpoint

    def _not_committed(self, error: TandemError) -> None:
        self._events.write("checkpoint-failed", why=str(error))
        self._report(
            replace(self._progress, note=f"a checkpoint was not written, training goes on: {error.failed}")
        )
