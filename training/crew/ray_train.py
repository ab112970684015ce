"""Ray Train's controller, as Tandem uses it: it starts attendants, as many as the crew's policy says.

What is left out of Ray Train is what this use has no need of, and what costs a process at every start: the
actor that shares out resources, the one that watches for preempted nodes, the one that removes
placement groups, and the one at which workers meet to report. The coordinator does the first two,
`training.crew.placement` the third, and nobody reports.

Written against Ray 2.60's internals; imported only in the controller's own process.
"""

from __future__ import annotations

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

from training.crew.attend import Attendant, Errand
from training.crew.scaling import CrewPolicy

_SETTINGS = {
    HEALTH_CHECK_INTERVAL_S_ENV_VAR: "0.25",
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR: "30",
    ENABLE_PREEMPTION_WATCHER_ENV_VAR: "0",
}
_LOOK_EVERY_S = 1.0
"""How often Ray Train asks its workers whether they still wait: each time costs all of its processes a few
milliseconds. What the coordinator wants is heard at once all the same."""
_LEFT_OUT = (
    "DatasetsCallback",
    "PlacementGroupCleanerCallback",
    "WorkerMetricsCallback",
    "WorkingDirectorySetupCallback",
)


def new_controller(
    run_name: str,
    coordinator: Any,
    workers: tuple[int, int],
    resources: dict[str, float],
    folder: str,
) -> Any:
    """A controller to be run in this process; its arguments are `training.crew.placement.Placement`'s."""
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
    return trainer.controller(CrewPolicy(scaling, coordinator, elastic), Errand(coordinator))


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
    """In a process of its own, so that what is replaced here is replaced nowhere else."""

    worker_group_cls = _WorkerGroup

    def __init__(self, **arguments: Any) -> None:
        # Read by Ray Train while it is made. In a runtime environment they would cost a new process.
        os.environ.update(_SETTINGS)
        worker_group.SynchronizationActor = _NoBarrier
        worker_group_state._shutdown_sync_actor = lambda _: None
        super().__init__(**arguments)

    async def _poll_workers(self) -> Any:
        await self._scaling_policy.until_wanted(_LOOK_EVERY_S)
        return await super()._poll_workers()


class _Trainer(DataParallelTrainer):  # type: ignore[misc]
    def controller(self, policy: CrewPolicy, errand: Errand) -> _Controller:
        """What `fit` would start in an actor."""
        return _Controller(
            train_fn_ref=errand,
            scaling_policy=policy,
            failure_policy=create_failure_policy(self.run_config.failure_config),
            train_run_context=self.train_run_context,
            callbacks=[c for c in self._create_default_callbacks() if type(c).__name__ not in _LEFT_OUT],
        )


def _nothing() -> None:
    """Ray Train wants a function."""
