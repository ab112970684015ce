"""Ray Train's part: it holds the resources of a run's workers, and finds others when they are lost.

Nothing that Ray Train does can end a run: failures of its workers are always retried, its storage is a
folder that nothing of value is written to, no checkpoint passes through `report`, and a controller that
dies is replaced while training goes on (`training.trainer`).

What is left out of Ray Train is what this use has no need of, and what costs a process at every start: the
actor that shares out resources, the one that watches for preempted nodes, the one that removes
placement groups, and the one at which workers meet to report. The coordinator does the first two,
`Placement.close` the third, and nobody reports.

Written against Ray 2.60's internals; imported only by a driver that is about to train.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2._internal.constants import (
    ENABLE_PREEMPTION_WATCHER_ENV_VAR,
    HEALTH_CHECK_INTERVAL_S_ENV_VAR,
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
)
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import create_failure_policy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, worker_group
from ray.train.v2._internal.execution.worker_group import state as worker_group_state
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group

from training.crew.attend import Attendant, Errand
from training.crew.scaling import CrewPolicy

_SETTINGS = {
    HEALTH_CHECK_INTERVAL_S_ENV_VAR: "0.25",
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR: "30",
    ENABLE_PREEMPTION_WATCHER_ENV_VAR: "0",
}
_LEFT_OUT = (
    "DatasetsCallback",
    "PlacementGroupCleanerCallback",
    "WorkerMetricsCallback",
    "WorkingDirectorySetupCallback",
)
_CLOSE_S = 5.0


class _WorkerGroup(WorkerGroup):  # type: ignore[misc] # Ray's own types are not followed
    """Workers that only hold resources."""

    _worker_cls = Attendant

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        """None of its own: with one, no process that Ray keeps ready could be used."""
        return custom_runtime_env

    def _init_train_context_on_workers(self, workers: Any, sync_actor: Any, train_context_args: Any) -> None:
        told = []
        for worker in workers:
            ranks = worker.distributed_context
            told.append(worker.actor.take_rank.remote(ranks.world_rank, ranks.world_size))
        ray.get(told)


class _NoBarrier:
    """In place of the actor at which Ray Train's workers would meet to report."""

    @classmethod
    def options(cls, **_: Any) -> type[_NoBarrier]:
        return cls

    @classmethod
    def remote(cls, **_: Any) -> _NoBarrier:
        return cls()


class _Controller(TrainController):  # type: ignore[misc]
    """Ray Train's, in a process of its own, so that what is replaced here is replaced nowhere else."""

    worker_group_cls = _WorkerGroup

    def __init__(self, **arguments: Any) -> None:
        # Read by Ray Train while it is made. In a runtime environment they would cost a new process.
        os.environ.update(_SETTINGS)
        worker_group.SynchronizationActor = _NoBarrier
        worker_group_state._shutdown_sync_actor = lambda _: None
        super().__init__(**arguments)


class _Trainer(DataParallelTrainer):  # type: ignore[misc]
    def start(self, policy: CrewPolicy, errand: Errand) -> Any:
        """What `fit` does, without waiting for the end."""
        here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
        controller: Any = ray.remote(num_cpus=0, label_selector=here)(_Controller)
        return controller.remote(
            train_fn_ref=errand,
            scaling_policy=policy,
            failure_policy=create_failure_policy(self.run_config.failure_config),
            train_run_context=self.train_run_context,
            callbacks=[c for c in self._create_default_callbacks() if type(c).__name__ not in _LEFT_OUT],
        )


class Placement:
    """A running Ray Train, seen from the driver.

    Args:
        run_name: what Ray's tools call it.
        coordinator: the handle of a `training.crew.coordinator.Coordinator`.
        workers: how many at least and at most.
        resources: Ray's, of one worker.
        folder: an empty one, for what Ray Train writes.
    """

    def __init__(
        self,
        run_name: str,
        coordinator: Any,
        workers: tuple[int, int],
        resources: dict[str, float],
        folder: str,
    ) -> None:
        self.groups: tuple[str, ...] = ()
        """The placement groups that are known to have been its own, to be removed if it is killed."""
        elastic = workers[0] != workers[1]
        scaling = ScalingConfig(
            num_workers=workers if elastic else workers[1],
            use_gpu=resources.get("GPU", 0) > 0,
            resources_per_worker=resources,
        )
        trainer = _Trainer(
            _nothing,  # workers get an errand instead
            scaling_config=scaling,
            # The name is the folder's: Ray silently resumes a run name that it has seen before.
            run_config=RunConfig(
                name=run_name,
                storage_path=folder,
                failure_config=FailureConfig(max_failures=-1, controller_failure_limit=-1),
            ),
        )
        self.controller = trainer.start(CrewPolicy(scaling, coordinator, elastic), Errand(coordinator))
        self.done = self.controller.run.remote()
        """Ready when Ray Train has ended, whether well or not."""

    def failure(self) -> Exception | None:
        """Why Ray Train ended, once `done` is ready."""
        try:
            ray.get(self.done)
            result: Any = ray.get(self.controller.get_result.remote(), timeout=_CLOSE_S)
        except ray.exceptions.RayError as error:
            return RuntimeError(str(error))
        failure: Exception | None = result.error
        return failure

    def close(self) -> None:
        """Let it end by itself, as it does once its workers are told so; or end it."""
        ended, _ = ray.wait([self.done], timeout=_CLOSE_S)
        if not ended:
            self.abandon()
        ray.kill(self.controller)

    def abandon(self) -> None:
        """End it at once, and free what it holds."""
        ray.kill(self.controller)
        for group in self.groups:
            with contextlib.suppress(ray.exceptions.RayError):
                _remove(group)


def _nothing() -> None:
    """Ray Train wants a function."""


def _remove(group: str) -> None:
    from ray._raylet import PlacementGroupID

    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
