"""How many workers Ray Train starts, and where: as the coordinator says.

Ray Train asks its policy in every round of its control loop, and a policy that blocks or raises ends the
run. So the coordinator's answer is only looked at when it has arrived. A resize restarts all of Ray Train's
workers; by the time it is asked for, nobody works on what is given away, and the training processes
outlive the restart.

Imported where Ray Train is, and nowhere else.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import ray
from ray.train.v2._internal.execution.scaling_policy import (
    AUTOSCALING_REQUESTS_INTERVAL_S,
    NoopDecision,
    ResizeDecision,
    ScalingPolicy,
)
from ray.train.v2._internal.execution.scaling_policy.autoscaling_coordinator_client import (
    TrainAutoscalingCoordinatorClient,
)

from training.crew.roles import Resize

_PATIENCE_S = 0.2
"""How long a round may wait for an answer while there are no workers."""
_NODE_LABEL = "ray.io/node-id"


class CrewPolicy(ScalingPolicy):  # type: ignore[misc] # Ray's own types are not followed
    """Obeys the coordinator. Lives in Ray Train's controller.

    Args:
        scaling_config: Ray Train's.
        coordinator: the handle of a `training.crew.coordinator.Coordinator`.
        elastic: whether the number of workers may vary; then an autoscaler is asked for the most.
    """

    def __init__(self, scaling_config: Any, coordinator: Any, elastic: bool) -> None:
        super().__init__(scaling_config)
        self._coordinator = coordinator
        self._elastic = elastic
        self._coming: tuple[str, Any] | None = None
        self._where: dict[str, str] | None = None

    def make_decision_for_non_running_worker_group(self) -> Any:
        """After a failure, and at the start: as many as there is room for."""
        return self._decision(self._answer("room", _PATIENCE_S))

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> Any:
        """Whether the coordinator wants another size, or other nodes."""
        return self._decision(self._answer("wanted", 0.0))

    async def until_wanted(self, within_s: float) -> None:
        """Wait until the coordinator wants something, `within_s` at most."""
        await asyncio.wait([asyncio.wrap_future(self._asked("wanted").future())], timeout=within_s)

    def on_controller_start_worker_group(
        self, *, scaling_config: Any, num_workers: int
    ) -> dict[str, str] | None:
        """On which nodes the workers may be placed."""
        return self._where

    def after_controller_start(self, train_run_context: Any) -> None:
        """Tell the autoscaler, if there is one, how many workers there may be.

        Ray Train's own policies start an actor here that shares out resources, and wait for it. Without an
        autoscaler it isn't needed, and with one nothing waits for it.
        """
        if not self._elastic or ray._private.state.state.get_cluster_config() is None:
            return
        self._requester_id = f"train-{train_run_context.run_id}"
        self._coordinator_client = TrainAutoscalingCoordinatorClient(self._requester_id)
        threading.Thread(target=self._keep_asking, name="autoscaler", daemon=True).start()

    async def before_controller_shutdown(self) -> None:
        """Nothing was asked of anyone."""

    def before_controller_abort(self) -> None:
        """Nothing was asked of anyone."""

    def _get_num_workers_for_resource_request(self) -> int:
        return int(self.scaling_config.max_workers)

    def _decision(self, resize: Resize | None) -> Any:
        if resize is None:
            return NoopDecision()
        self._where = None
        if resize.within:
            self._where = {_NODE_LABEL: f"in({','.join(resize.within)})"}
        elif resize.avoid:
            self._where = {_NODE_LABEL: f"!in({','.join(resize.avoid)})"}
        return ResizeDecision(
            num_workers=resize.workers,
            resources_per_worker=self.scaling_config._resources_per_worker_not_none,
        )

    def _answer(self, question: str, patience_s: float) -> Resize | None:
        """What the coordinator answers, if it has; it is asked once at a time."""
        try:
            ready, _ = ray.wait([self._asked(question)], timeout=patience_s)
            if not ready:
                return None
            self._coming = None
            answer: Resize | None = ray.get(ready[0])
            return answer
        except ray.exceptions.RayError:
            self._coming = None
            return None  # the driver sees that the coordinator is gone, and ends the run

    def _asked(self, question: str) -> Any:
        """The answer to come."""
        if self._coming is None or self._coming[0] != question:
            self._coming = (question, getattr(self._coordinator, question).remote())
        return self._coming[1]

    def _keep_asking(self) -> None:
        while True:
            self._send_resource_request()  # tells of failures in the log, and goes on
            time.sleep(AUTOSCALING_REQUESTS_INTERVAL_S)
