"""Ray Train's part: it holds the resources of a run's workers, and finds others when they are lost.

Nothing that Ray Train does can end a run: failures of its workers are always retried, its storage is a
folder that nothing of value is written to, no checkpoint passes through `report`, and a controller that
dies is replaced while training goes on (`training.trainer`).

Ray Train takes most of a second to import, so only one process does, its controller's, which can be
started before it is known what for.
"""

from __future__ import annotations

import contextlib
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group

from cluster.imports import uncollected

_CLOSE_S = 5.0


class Controller:
    """An actor with Ray Train's controller in it (`training.crew.ray_train`)."""

    def __init__(self) -> None:
        with uncollected():
            from training.crew.ray_train import new_controller

        self._new = new_controller
        self._controller: Any = None

    async def run(self, *arguments: Any) -> None:
        """Hold workers until they are told that training is over; the arguments are `Placement`'s."""
        self._controller = self._new(*arguments)
        await self._controller.run()

    def error(self) -> str | None:
        """Why it ended, once `run` has; None where all went well."""
        failure = self._controller.get_result().error
        return None if failure is None else str(failure)


def start_controller() -> Any:
    """The handle of a `Controller` on this driver's node, at once; it is importing Ray Train."""
    here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    make: Any = ray.remote(num_cpus=0, label_selector=here)(Controller)
    return make.remote()


class Placement:
    """A running Ray Train, seen from the driver.

    Args:
        controller: what `start_controller` gave.
        run_name: what Ray's tools call it.
        coordinator: the handle of a `training.crew.coordinator.Coordinator`.
        workers: how many at least and at most.
        resources: Ray's, of one worker.
        folder: an empty one, for what Ray Train writes.
    """

    def __init__(
        self,
        controller: Any,
        run_name: str,
        coordinator: Any,
        workers: tuple[int, int],
        resources: dict[str, float],
        folder: str,
    ) -> None:
        self.groups: tuple[str, ...] = ()
        """The placement groups that are known to have been its own, to be removed if it is killed."""
        self.controller = controller
        self.done = controller.run.remote(run_name, coordinator, workers, resources, folder)
        """Ready when Ray Train has ended, whether well or not."""

    def failure(self) -> str:
        """Why Ray Train ended, once `done` is ready."""
        try:
            ray.get(self.done)
            return str(ray.get(self.controller.error.remote(), timeout=_CLOSE_S))
        except ray.exceptions.RayError as error:
            return str(error)

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


def _remove(group: str) -> None:
    from ray._raylet import PlacementGroupID

    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))
