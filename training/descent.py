"""Gradient descent: the method of every `training.task.Task`.

Each step is a global batch, of which every worker has its share. A batch that ruins the weights is gone
back behind, and left out.

Knows neither how a group is formed nor what becomes of the worker afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import cast

import torch

from cluster.artifacts import Artifacts
from cluster.errors import RunFailed, StorageError
from cluster.events import EventWriter
from cluster.manifest import Manifest, Writer
from cluster.runs import Run
from cluster.storage import Store
from training.checkpoints.checkpoint import CheckpointMeta, load_checkpoint, restore_model
from training.checkpoints.saver import Saver, Stage
from training.data.dataset import Dataset
from training.data.loader import HostBatch, Loader
from training.device import worker_device
from training.export import export
from training.fine_tuning import freeze, take_weights
from training.flops import tell_flops
from training.group import Group
from training.line import Line
from training.loop import TrainState, new_state, train_steps
from training.losses import Poisoned
from training.memory import Memory
from training.method import Exported, Heard, Method, Saving, Terms
from training.problem import Problem
from training.recipe import Optimization, Origin
from training.recorder import Recorder, Seat
from training.replicate import replicate
from training.reporter import Reporter
from training.sharding import shard
from training.task import Task


class Weights:
    """Models and their optimizers, as `training.method.States`."""

    def __init__(
        self,
        task: Task,
        optimization: Optimization,
        device: torch.device,
        *,
        origin: Origin | None = None,
        store: Store | None = None,
    ) -> None:
        self._task = task
        self._optimization = optimization
        self._device = device
        self._origin = origin
        self._store = store

    def blank(self, *, sharded: bool) -> TrainState:
        def prepare(model: torch.nn.Module) -> None:
            if self._origin is not None:
                freeze(model, self._origin.freeze)
            if sharded:
                shard(model)

        return new_state(self._task, self._optimization, self._device, prepare)

    def begin(self, state: TrainState) -> None:
        if self._origin is not None:
            assert self._store is not None, "an origin is a version of the run's store"
            take_weights(state.model, self._origin, self._store)

    def load(self, state: TrainState, artifacts: Artifacts, manifest: Manifest) -> CheckpointMeta:
        return load_checkpoint(state, artifacts, manifest)

    def replicate(self, state: TrainState, source: int, group: Group) -> None:
        replicate(state, source, group)

    def replace(self, held: TrainState, by: TrainState) -> None:
        held.model, held.optimizer = by.model, by.optimizer


class Descent(Method[TrainState]):
    """One worker's."""

    def __init__(self, terms: Terms) -> None:
        super().__init__(terms)
        recipe = terms.recipe
        torch.set_num_threads(max(1, int(recipe.workers.cpus)))
        self._task = cast(Task, terms.problem)
        self._dataset = Dataset.open(recipe.data.train, disk_bytes=int(recipe.data.cache_gib * 2**30))
        self._dataset.check_unchanged(terms.facts.fingerprint)
        self._plan = self._dataset.plan(recipe.optimization.seed)
        steps_per_epoch = self._plan.steps_per_epoch(recipe.optimization.global_batch_size)
        self.total_steps = recipe.optimization.epochs * steps_per_epoch
        self._device = worker_device(recipe)
        weights = Weights(
            self._task,
            recipe.optimization,
            self._device,
            origin=recipe.initialize_from,
            store=terms.run.store,
        )
        fingerprint = terms.facts.fingerprint
        self.memory = Memory(terms.run, recipe.strategy, fingerprint, weights, self._device)
        self._stage = Stage()

    def saver(self, seat: Seat, heard: Heard) -> Saver:
        return Saver(
            self.terms.run,
            self.memory.state,
            seat.recipe.checkpoint,
            rank=seat.group.rank,
            world=seat.group.world,
            exchange=seat.group.client(),
            newest=self.memory.head,
            writer=Writer(epoch=self.terms.epoch, generation=seat.group.generation),
            on_commit=heard.committed,
            on_failure=heard.gave_up,
            stage=self._stage,
            on_trouble=heard.troubled,
        )

    def train(
        self, seat: Seat, line: Line, recorder: Recorder, saver: Saving, reporter: Reporter | None
    ) -> None:
        """Step to the end, going back behind each batch that ruins the weights and leaving it out."""
        optimization = seat.recipe.optimization
        while True:
            state = self.memory.state
            loader = Loader(
                self._dataset,
                self._plan,
                self._task,
                global_batch_size=optimization.global_batch_size,
                rank=seat.group.rank,
                world_size=seat.group.world,
                cursor=state.cursor,
                epochs=optimization.epochs,
            )
            try:
                with loader as batches:
                    train_steps(
                        self._task,
                        state,
                        self._telling_flops(batches, seat.group.rank, seat.events),
                        optimization,
                        total_steps=self.total_steps,
                        device=self._device,
                        hooks=recorder,
                        spike_factor=seat.recipe.faults.spike_factor,
                    )
                return
            except Poisoned as poisoned:
                self._go_back(poisoned, seat, line, saver, reporter)

    def _telling_flops(
        self, batches: Iterable[HostBatch], rank: int, events: EventWriter
    ) -> Iterator[HostBatch]:
        """The batches, of which the first tells rank 0 what a row costs."""
        for number, batch in enumerate(batches):
            if number == 0 and rank == 0:
                precision = self.terms.recipe.optimization.precision
                tell_flops(self._task, batch.arrays, self._device, precision, events)
            yield batch

    def _go_back(
        self, poisoned: Poisoned, seat: Seat, line: Line, saver: Saving, reporter: Reporter | None
    ) -> None:
        allowed = seat.recipe.faults.skip_at_most
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
            saver.wait(seat.recipe.checkpoint.retry_s)
        meta = self.memory.go_back(seat.group, seat.events)
        line.back_to(meta, poisoned.start, poisoned.stop)
        if reporter:
            seat.events.write(
                "rolled-back",
                why=poisoned.failed,
                step=poisoned.step,
                to_step=meta.step,
                checkpoint=self.memory.checkpoint,
                rows=[poisoned.start, poisoned.stop],
            )
            reporter.note(
                f"{poisoned.failed}: going back to step {meta.step}, and leaving that step's batch out"
            )
        seat.control.phase = "training"

    def close(self) -> None:
        self._stage.close()

    @staticmethod
    def export(run: Run, problem: Problem) -> Exported | None:
        task = cast(Task, problem)
        model = task.build_model()
        found = restore_model(model, run.checkpoints(), lambda number, error: None)
        if found is None:
            return None
        return Exported(export(task, model), found.number, found.meta.step)
