"""What a training process and its keeper say to each other, as JSON lines over a socket.

*Orders* go to the training process (a *member*), *sayings* come from it. A member belongs to one
*generation* at a time: a process group of `world` ranks. Anything about a generation that has
passed is ignored, so a late message does no harm.

The usual talk: Ready; Join → Hosting (rank 0 only, once more Join for the others) → Joined; Beats and
progress; Ended. When a peer dies: Parted, then a new Join. For a resize: Pause → Paused, then a new Join or
Leave.

Knows neither Ray nor torch.
"""

from __future__ import annotations

import socket
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter

from cluster import errors
from cluster.config import Frozen
from cluster.errors import RunFailed, TandemError


class Spec(Frozen):
    """What a training process is started with; it holds for every generation it takes part in."""

    recipe: dict[str, Any]
    run: str
    facts: dict[str, Any]
    epoch: int
    """Of the driver's lease (`cluster.lease`)."""
    member: str
    """Unique within the run, such as `m3`."""
    environment: dict[str, str] = {}
    """Set before anything of the member's runs: devices, import paths, credentials."""
    path: tuple[str, ...] = ()
    """Put in front of `sys.path`."""


class Join(Frozen):
    """Form generation `generation`. Without a port, rank 0 opens the rendezvous and says `Hosting`."""

    order: Literal["join"] = "join"
    generation: int
    attempt: str
    """Names the generation in events and in the ledger; the same for every rank."""
    rank: int
    world: int
    host: str
    """The address at which the others reach rank 0."""
    port: int | None


class Pause(Frozen):
    """Sent to rank 0: let every rank stop after the same step, with its state kept in memory."""

    order: Literal["pause"] = "pause"
    generation: int
    save: bool
    """Whether a checkpoint of that step has to be committed before `Paused` is said."""


class Part(Frozen):
    """A peer is gone: abort whatever waits for it, and say `Parted`."""

    order: Literal["part"] = "part"
    generation: int


class Leave(Frozen):
    """End this process."""

    order: Literal["leave"] = "leave"


class Ready(Frozen):
    """The process is up and waits for a `Join`."""

    saying: Literal["ready"] = "ready"
    pid: int


class Hosting(Frozen):
    """Rank 0 listens here for the others."""

    saying: Literal["hosting"] = "hosting"
    generation: int
    port: int


class Joined(Frozen):
    """The group stands and has one state; stepping begins after `step`."""

    saying: Literal["joined"] = "joined"
    generation: int
    step: int
    source: Literal["fresh", "memory", "store"]
    """Where the state came from: nowhere yet, a survivor's memory, a checkpoint."""


class Beat(Frozen):
    """Said every second by a thread, so silence means that the process is stopped or cut off."""

    saying: Literal["beat"] = "beat"
    generation: int
    step: int
    """Steps done."""
    progress: int
    """Grows with whatever the process does; two ranks that wait for a third differ from it in this."""
    waiting: bool
    """Whether it is in a collective, so that a hang isn't its own."""
    phase: str
    """What it does: joining, restoring, training, saving, waiting."""


class Told(Frozen):
    """Progress for people, from rank 0: the fields of `training.progress.Progress`."""

    saying: Literal["told"] = "told"
    generation: int
    progress: dict[str, Any]


class Parted(Frozen):
    """The group broke; this process has kept the state after `step` and waits for a `Join`."""

    saying: Literal["parted"] = "parted"
    generation: int
    step: int
    why: str


class Paused(Frozen):
    """Stopped at a step boundary as agreed; the state is kept; waits for a `Join` or a `Leave`."""

    saying: Literal["paused"] = "paused"
    generation: int
    step: int
    saved: bool


class Ended(Frozen):
    """The last step is done, and committed."""

    saying: Literal["ended"] = "ended"
    generation: int
    steps: int
    samples_per_s: float


class Failed(Frozen):
    """The member can't go on, and not for want of a peer. It waits for `Leave`, or for another `Join`."""

    saying: Literal["failed"] = "failed"
    generation: int
    error: dict[str, str]
    """As `error_fields` gives it."""
    retryable: bool


Order = Annotated[Join | Pause | Part | Leave, Field(discriminator="order")]
Saying = Annotated[
    Ready | Hosting | Joined | Beat | Told | Parted | Paused | Ended | Failed, Field(discriminator="saying")
]
_ORDERS: TypeAdapter[Join | Pause | Part | Leave] = TypeAdapter(Order)
_SAYINGS: TypeAdapter[Ready | Hosting | Joined | Beat | Told | Parted | Paused | Ended | Failed] = (
    TypeAdapter(Saying)
)


def parse_order(line: bytes) -> Join | Pause | Part | Leave:
    """An order from its line."""
    return _ORDERS.validate_json(line)


def parse_saying(line: bytes) -> Ready | Hosting | Joined | Beat | Told | Parted | Paused | Ended | Failed:
    """A saying from its line."""
    return _SAYINGS.validate_json(line)


def send(channel: socket.socket, message: Frozen) -> None:
    """Write one message. Senders in several threads need a lock around it.

    Raises:
        OSError: the other side is gone.
    """
    channel.sendall(message.model_dump_json().encode() + b"\n")


def error_fields(error: TandemError) -> dict[str, str]:
    """An error as plain text fields, `kind` being the name of its class."""
    return {"kind": type(error).__name__, **error.parts()}


def error_from(fields: dict[str, str]) -> TandemError:
    """The error that `error_fields` described; of an unknown kind, a `RunFailed`."""
    parts = {name: text for name, text in fields.items() if name != "kind"}
    kind = getattr(errors, fields.get("kind", ""), None)
    if isinstance(kind, type) and issubclass(kind, TandemError):
        try:
            return kind(parts.pop("failed", ""), **parts)
        except TypeError:  # a class that wants more, such as Overloaded
            pass
    return RunFailed(fields.get("failed", ""), **{n: t for n, t in parts.items() if n != "failed"})
