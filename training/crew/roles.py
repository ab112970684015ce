"""The words of the roster: what it is told of places and processes, and what it decides.

Frozen values, so that a schedule of events can be written down, replayed and compared
(`training.crew.roster`). Knows neither Ray nor torch nor time.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import TandemError
from training.crew.messages import Join, Leave, Part, Pause

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, slots=True)
class Rules:
    """What a run allows, and how long each thing may take."""

    run: str
    attempt: str
    """Of this driver; generation 3 of it is called `{attempt}-g3`."""
    min_workers: int
    max_workers: int
    silent_s: float = 8.0
    stuck_s: float = 300.0
    retry_s: float = 600.0
    """How long a store that is out of reach when a group starts is waited for."""
    max_failures: int = 3
    same_step_failures: int = 3
    """So many failures in a row after the same step end the run: another try meets the same."""
    hire_s: float = 90.0
    """From asking for a member until it is ready; a node's first waits for its imports."""
    keeper_s: float = 40.0
    """For a keeper to appear on a node that has seats, before the seats are passed over."""
    join_s: float = 120.0
    """Without a sign of progress from anyone, while a generation forms."""
    part_s: float = 5.0
    leave_s: float = 5.0
    end_s: float = 15.0
    """From rank 0's end to that of the others."""
    unseated_s: float = 30.0
    """How long members may go on while Ray Train renews what holds their resources."""
    ask_again_s: float = 60.0
    stall_s: float = 3.0
    """Between two ticks: above it, this process itself stood still, and silence proves nothing."""


@dataclass(frozen=True, slots=True)
class Seat:
    """The resources of one worker, held by a Ray Train worker of group `group`."""

    group: str
    rank: int
    world: int
    node: str
    ip: str
    devices: tuple[str, ...] = ()
    """Accelerators by their ids on the node, such as `("0",)`."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a process ended: as `Popen.returncode` has it, a signal being negative."""

    code: int
    out_of_memory: bool = False

    def __str__(self) -> str:
        if self.out_of_memory:
            return OUT_OF_MEMORY
        if self.code >= 0:
            return f"exit code {self.code}"
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"signal {-self.code}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What is known at the end of training."""

    steps: int
    samples_per_s: float
    """Rows a second over all workers, as rank 0 measured them."""


@dataclass(frozen=True, slots=True)
class Hire:
    """Start a training process on a node."""

    node: str
    member: str
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tell:
    """Give a member an order."""

    member: str
    order: Join | Pause | Part | Leave


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL a member; that it ended is told like any other end."""

    member: str


@dataclass(frozen=True, slots=True)
class NeedKeeper:
    """A node has seats but no keeper."""

    node: str


@dataclass(frozen=True, slots=True)
class Resize:
    """Have Ray Train hold the resources of so many workers instead."""

    workers: int
    within: tuple[str, ...] = ()
    """If given, on these nodes only."""
    avoid: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Note:
    """A line for people."""

    text: str


@dataclass(frozen=True, slots=True)
class Record:
    """An event of the run."""

    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Forward:
    """Progress, for whoever watches: the fields of `training.progress.Progress`."""

    progress: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class End:
    """Training is over: with what it gave, or with the error that ends the run."""

    outcome: Outcome | TandemError


Decision = Hire | Tell | Kill | NeedKeeper | Resize | Note | Record | Forward | End


@dataclass(slots=True)
class Member:
    """What the roster knows of one training process."""

    name: str
    node: str
    devices: tuple[str, ...]
    hired_s: float
    heard_s: float
    ready: bool = False
    doomed_s: float | None = None
    """When it was told to leave, or killed: it takes part in nothing any more."""
    generation: int | None = None
    """That it was told to join, and has neither parted from nor paused in."""
    joined: bool = False
    ended: bool = False
    warm: bool = False
    """Whether it holds state, after `step`."""
    step: int = 0
    progress: int = -1
    moved_s: float = 0.0
    """When `progress` or `step` last grew."""
    waiting: bool = False
    phase: str = "starting"
    failures: int = 0
    """In a row, of the kind that it survives."""


@dataclass(slots=True)
class Generation:
    """One process group, from the first Join until all have parted or paused."""

    number: int
    attempt: str
    members: list[str]
    """By rank."""
    phase: str
    """hosting, joining, training, pausing, breaking, ending."""
    since_s: float
    """Of the phase."""
    step: int = 0
    step_s: float = 0.0
    """When the slowest member's step last grew."""
    sources: set[str] = field(default_factory=set)
    outcome: Outcome | None = None
    begun: bool = False
    """Whether it ever made steps."""
    put_off: bool = False
    """Whether it couldn't start for want of the store."""
    cause: str | None = None
    """Why its members parted, where none of them was seen to end."""
