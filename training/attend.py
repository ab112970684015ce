"""What each of Ray Train's workers runs: it holds the resources of one training process, and waits.

It checks in with the coordinator and stays until training is over; the training process itself belongs
to its node's keeper. So a worker that dies, or is replaced, costs the training nothing as long as another
one takes the seat. It never fails: what ends a run is told to the driver by the coordinator, and Ray Train
has nothing to restart.

Imports nothing heavy, since it is imported by every worker at its start.
"""

from __future__ import annotations

from typing import Any

import ray

from training.roles import Seat

ANSWER_S = 60.0


def attend(config: dict[str, Any]) -> None:
    """Hold one seat until the run is over, or its coordinator is gone."""
    coordinator = config["coordinator"]
    seat = _seat()
    while True:
        try:
            stay = ray.get(coordinator.attend.remote(seat), timeout=ANSWER_S)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return
        if not stay:
            return


def _seat() -> Seat:
    import ray.train

    context = ray.train.get_context()
    here = ray.get_runtime_context()
    group = ray.util.get_current_placement_group()
    devices = here.get_accelerator_ids()
    return Seat(
        group=group.id.hex(),
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        node=here.get_node_id(),
        ip=ray.util.get_node_ip_address(),
        devices=tuple(str(device) for device in devices.get("GPU", [])),
    )
