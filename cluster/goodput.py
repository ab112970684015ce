"""Where a run's worker-seconds went, worked out from its events.

A *member* is a training process; a *seat* is what one needs (CPUs, GPUs). Two sources are put together:
- `account`, from each member: seconds of each kind since it began (training.goodput.Account), which
  fill its span of time exactly. Fields: `member` and `account`, which together name it, `seconds`
  {kind: s}; for people `generation`, `rank`, `final`;
- from the coordinator: `generation-started` with `generation` and `world`, the seats held from then on;
  `lent` with `workers` and the `world` that is left; `returned`.

What no member accounts for is filled in: where fewer members than seats are there, it is `restart`: the
time between a death and the next process, and a killed member's last seconds, of which nobody can
tell any more; and lent seats are `lent`. A driver that takes a run up again counts its generations
from 1, and what lies between two drivers belongs to nobody.

Works with whatever events there are: without the coordinator's, the accounts speak for themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

Kind = Literal["compute", "data", "communication", "save", "restart", "redone", "idle", "lent"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_OF_A_STEP: tuple[Kind, ...] = ("compute", "data", "communication")

MEANING: Mapping[str, str] = {
    "compute": "steps",
    "data": "waiting for a batch",
    "communication": "waiting for other workers and the network",
    "save": "steps held up by checkpoints",
    "restart": "starting, restoring, forming a group",
    "redone": "steps done before, repeated after a failure",
    "idle": "held without work",
    "lent": "lent to others",
}


@dataclass(frozen=True, slots=True)
class Goodput:
    """Worker-seconds by kind; they sum to the time that seats were held or lent."""

    worker_s: dict[Kind, float]
    wall_s: float
    """From the first member's start to the last that is known of one."""

    @property
    def total_s(self) -> float:
        """All worker-seconds."""
        return sum(self.worker_s.values())

    @property
    def goodput(self) -> float | None:
        """The share that was compute, of what the run had for itself (not lent); None of nothing."""
        own_s = self.total_s - self.worker_s["lent"]
        return self.worker_s["compute"] / own_s if own_s > 0 else None

    def with_redone(self, seconds: float) -> Goodput:
        """This, with so many seconds of steps booked as `redone`: from each kind of a step its share."""
        of_steps = {kind: self.worker_s[kind] for kind in _OF_A_STEP}
        there_s = sum(of_steps.values())
        moved_s = min(max(seconds, 0.0), there_s)
        if moved_s == 0:
            return self
        kept = {kind: each * (1 - moved_s / there_s) for kind, each in of_steps.items()}
        redone_s = self.worker_s["redone"] + moved_s
        return Goodput({**self.worker_s, **kept, "redone": redone_s}, self.wall_s)

    def share(self, kind: Kind) -> float:
        """One kind's share of all worker-seconds, 0 to 1."""
        return self.worker_s[kind] / self.total_s if self.total_s > 0 else 0.0


class _Member(NamedTuple):
    """What is known of one member: its span of time, and its account of it."""

    start: datetime
    stop: datetime
    seconds: dict[Kind, float]
    total_s: float


class _Change(NamedTuple):
    """How many seats the run holds from a moment on; None leaves a number as it is."""

    at: datetime
    world: int | None
    lent: int | None
    generation: int | None


@dataclass(slots=True)
class TimeBook:
    """Takes a run's events in any order and gives its `Goodput`; passes over what it can't read."""

    _members: dict[str, _Member] = field(default_factory=dict)
    _changes: list[_Change] = field(default_factory=list)

    def add(self, event: Mapping[str, Any]) -> None:
        """Take one event into account; those of other names are passed over."""
        name = event.get("event")
        if name not in ("account", "generation-started", "lent", "returned"):
            return
        at = moment(event)
        if at is None:
            return
        if name == "account":
            self._add_account(at, event)
        elif name == "generation-started":
            self._changes.append(_Change(at, _count(event, "world"), None, _count(event, "generation")))
        elif name == "lent":
            self._changes.append(_Change(at, _count(event, "world"), _count(event, "workers"), None))
        else:
            self._changes.append(_Change(at, None, 0, None))

    def _add_account(self, at: datetime, event: Mapping[str, Any]) -> None:
        given = event.get("seconds")
        if not isinstance(given, Mapping):
            return
        seconds: dict[Kind, float] = {kind: _positive(given.get(kind)) for kind in KINDS}
        total_s = sum(seconds.values())
        name = f"{event.get('member')} {event.get('account')}"
        known = self._members.get(name)
        if known is None or total_s >= known.total_s:  # seconds since it began: the greatest is the last
            self._members[name] = _Member(at - timedelta(seconds=total_s), at, seconds, total_s)

    def goodput(self) -> Goodput:
        """The account up to the last that members have told."""
        worker_s: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
        members = sorted(self._members.values(), key=lambda member: member.start)
        if not members:
            return Goodput(worker_s, 0.0)
        for member in members:
            for kind, seconds in member.seconds.items():
                worker_s[kind] += seconds
        end = max(member.stop for member in members)
        for stretch, world, lent in _stretches(sorted(self._changes, key=lambda c: c.at), members, end):
            for length_s, alive in _attendance(members, stretch):
                worker_s["restart"] += max(0, world - alive) * length_s
                # A member beyond the world sits on a seat that is on its way back.
                worker_s["lent"] += max(0, lent - max(0, alive - world)) * length_s
        return Goodput(worker_s, (end - members[0].start).total_seconds())


def _stretches(
    changes: list[_Change], members: list[_Member], end: datetime
) -> Iterator[tuple[tuple[datetime, datetime], int, int]]:
    """Stretches of time with the number of seats that were held, and that were lent, in each."""
    world = lent = generation = 0
    for number, change in enumerate(changes):
        world = world if change.world is None else change.world
        lent = lent if change.lent is None else change.lent
        if change.generation is not None:
            lent = lent if change.generation > generation else 0
            generation = change.generation
        stop = changes[number + 1].at if number + 1 < len(changes) else end
        upcoming = next((c.generation for c in changes[number + 1 :] if c.generation is not None), None)
        if upcoming is not None and upcoming <= generation:
            # Another driver's: this one's seats were given up when its members were last heard of.
            stop = max((m.stop for m in members if m.stop <= stop), default=change.at)
        if stop > change.at:
            yield (change.at, stop), world, lent


def _attendance(members: list[_Member], stretch: tuple[datetime, datetime]) -> Iterator[tuple[float, int]]:
    """Pieces of a stretch of time, in seconds, with the number of members that were there."""
    start, stop = stretch
    here = [(max(m.start, start), min(m.stop, stop)) for m in members if m.start < stop and m.stop > start]
    edges = sorted({start, stop, *(edge for span in here for edge in span)})
    for left, right in pairwise(edges):
        yield (right - left).total_seconds(), sum(a <= left and right <= b for a, b in here)


def moment(event: Mapping[str, Any]) -> datetime | None:
    """When an event happened by its writer's clock; None where it doesn't say so."""
    try:
        at = datetime.fromisoformat(event["at"])
    except (KeyError, TypeError, ValueError):
        return None
    return at if at.tzinfo is not None else None


def _count(event: Mapping[str, Any], name: str) -> int | None:
    value = event.get(name)
    return value if type(value) is int and 0 <= value < 1_000_000 else None


def _positive(value: object) -> float:
    """A number of seconds, 0 for what isn't one (of a damaged event, or one of another release)."""
    return float(value) if type(value) in (int, float) and 0 < value < 1e12 else 0.0  # type: ignore[operator, arg-type]
