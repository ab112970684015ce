"""What each of Ray Train's workers is: it holds the resources of one training process, and waits.

It checks in with the coordinator and stays until training is over; the training process itself belongs
to its node's keeper. So a worker that dies, or is replaced, costs the training nothing as long as another
one takes the seat. It never fails: what ends a run is told to the driver by the coordinator, and Ray Train
has nothing to restart.

Ray Train's own worker class would import half a second's worth of Ray Train in every one of these
processes, for reports and checkpoints that don't pass here; this one answers what the controller asks
(`training.crew.ray_train`) and imports next to nothing. The fields of its answers have Ray Train's names.
"""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import dataclass, field
from typing import Any

import ray

from training.crew.roles import Seat

ANSWER_S = 60.0


@dataclass(frozen=True)
class Place:
    """Where a worker is."""

    hostname: str
    node_id: str
    node_ip: str
    pid: int
    accelerator_ids: dict[str, list[str]]

    @property
    def gpu_ids(self) -> list[str]:
        return self.accelerator_ids.get("GPU", [])


@dataclass(frozen=True)
class Status:
    """Whether a worker still waits; there is never anything else to report."""

    running: bool
    error: None = None
    training_report: None = None
    return_value: None = None
    preemption_info: None = None


@dataclass(frozen=True)
class Errand:
    """What a worker is sent to do: hold a seat, for this coordinator."""

    coordinator: Any = field(repr=False)


class Attendant:
    """An actor with the resources of one worker."""

    def __init__(self) -> None:
        self._rank, self._world = 0, 1
        self._thread: threading.Thread | None = None

    def get_metadata(self) -> Place:
        """Where it is."""
        here = ray.get_runtime_context()
        return Place(
            hostname=socket.gethostname(),
            node_id=here.get_node_id(),
            node_ip=ray.util.get_node_ip_address(),
            pid=os.getpid(),
            accelerator_ids=here.get_accelerator_ids(),
        )

    def take_rank(self, rank: int, world: int) -> None:
        """Which of the group's workers it is."""
        self._rank, self._world = rank, world

    def run_train_fn(self, errand: Errand) -> None:
        """Begin to hold the seat; gives nothing back, and doesn't wait."""
        group = ray.util.get_current_placement_group()
        place = self.get_metadata()
        seat = Seat(
            group=group.id.hex(),
            rank=self._rank,
            world=self._world,
            node=place.node_id,
            ip=place.node_ip,
            devices=tuple(str(device) for device in place.gpu_ids),
        )
        self._thread = threading.Thread(
            target=attend, args=(errand.coordinator, seat), name="attend", daemon=True
        )
        self._thread.start()

    def poll_status(self) -> Status:
        """Asked several times a second by Ray Train's controller."""
        return Status(running=self._thread is not None and self._thread.is_alive())

    def shutdown(self) -> None:
        """The process is about to be killed, which is all it takes."""


def attend(coordinator: Any, seat: Seat) -> None:
    """Hold one seat until the run is over, or its coordinator is gone."""
    while True:
        try:
            stay = ray.get(coordinator.attend.remote(seat), timeout=ANSWER_S)
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return
        if not stay:
            return
