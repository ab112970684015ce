"""Where a run's worker-seconds went, worked out from its events.

A *seat* is what one worker needs (CPUs, GPUs), held by the run for a while. On a seat, one *member*
after another runs: a training process. Every second of a held seat is of exactly one kind.

Two sources are put together:
- `account`, from each member: seconds of each kind since it began (training.goodput.Account), which
  fill its span of time exactly. Fields: `member`, `seconds` {kind: s}, `final` (true on its last one,
  when it leaves in good order), and for people `generation` and `rank`;
- from the coordinator, each with `seat`: `seat-held` when the run gets it, `seat-lent` and
  `seat-returned` around a loan, `seat-released` when the run gives it up, and `member-started` with
  `member`, which says whose seat it is.

What no member accounts for is filled in here: before a seat's first member, and after one that ended
without a final account, it is `restart` (so of a killed member's last seconds, too, which nobody can
tell any more); after a final account `idle`; while the seat is lent, `lent`. Members of which no event
names the seat get one each, so that a run without a coordinator, or with damaged events, has an account.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple, get_args

Kind = Literal["compute", "data", "communication", "save", "restart", "redone", "idle", "lent"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MEANING: Mapping[Kind, str] = {
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
    """Worker-seconds by kind; they sum to the time that seats were held."""

    worker_s: dict[Kind, float]
    wall_s: float
    """From the first moment that a seat was held to the last; shorter than the run where it lay still."""

    @property
    def total_s(self) -> float:
        """All worker-seconds."""
        return sum(self.worker_s.values())

    @property
    def goodput(self) -> float | None:
        """The share that was compute, of what the run had for itself (not lent); None of nothing."""
        own_s = self.total_s - self.worker_s["lent"]
        return self.worker_s["compute"] / own_s if own_s > 0 else None

    def share(self, kind: Kind) -> float:
        """One kind's share of all worker-seconds, 0 to 1."""
        return self.worker_s[kind] / self.total_s if self.total_s > 0 else 0.0


class _Span(NamedTuple):
    """When one member ran, and what became of it."""

    start: datetime
    stop: datetime
    final: bool


class _Held(NamedTuple):
    """A stretch of time in which a seat was held, or lent."""

    start: datetime
    stop: datetime
    lent: bool


@dataclass(slots=True)
class _Member:
    seconds: dict[Kind, float]
    span: _Span
    total_s: float


@dataclass(slots=True)
class SeatBook:
    """Takes a run's events in any order and gives its `Goodput`; passes over what it can't read."""

    _members: dict[str, _Member] = field(default_factory=dict)
    _seat_of: dict[str, str] = field(default_factory=dict)
    _changes: dict[str, list[tuple[datetime, str]]] = field(default_factory=dict)

    def add(self, event: Mapping[str, Any]) -> None:
        """Take one event into account; those of other names are passed over."""
        name = event.get("event")
        if name == "account":
            self._add_account(event)
        elif name in _SEAT_EVENTS:
            at = moment(event)
            seat = event.get("seat")
            if at is None or not isinstance(seat, str):
                return
            if name == "member-started":
                self._seat_of[str(event.get("member"))] = seat
            else:
                self._changes.setdefault(seat, []).append((at, str(name)))

    def _add_account(self, event: Mapping[str, Any]) -> None:
        at, given = moment(event), event.get("seconds")
        if at is None or not isinstance(given, Mapping):
            return
        seconds: dict[Kind, float] = {kind: _positive(given.get(kind)) for kind in KINDS}
        total_s = sum(seconds.values())
        member = str(event.get("member"))
        known = self._members.get(member)
        if known is None or total_s >= known.total_s:  # seconds since it began: the greatest is the last
            span = _Span(at - timedelta(seconds=total_s), at, event.get("final") is True)
            self._members[member] = _Member(seconds, span, total_s)

    def goodput(self) -> Goodput:
        """The account up to the last event."""
        spans: dict[str, list[_Span]] = {seat: [] for seat in self._changes}
        worker_s: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
        for name, member in self._members.items():
            spans.setdefault(self._seat_of.get(name, f"of {name}"), []).append(member.span)
            for kind, seconds in member.seconds.items():
                worker_s[kind] += seconds
        edges: list[datetime] = []
        for seat, members in spans.items():
            members.sort()
            held = _held(sorted(self._changes.get(seat, [])), members)
            for kind, seconds in _gaps(held, members):
                worker_s[kind] += seconds
            edges += [edge for stretch in held for edge in (stretch.start, stretch.stop)]
            edges += [edge for span in members for edge in (span.start, span.stop)]
        wall_s = (max(edges) - min(edges)).total_seconds() if edges else 0.0
        return Goodput(worker_s, wall_s)


_SEAT_EVENTS = frozenset({"seat-held", "seat-lent", "seat-returned", "seat-released", "member-started"})


def moment(event: Mapping[str, Any]) -> datetime | None:
    """When an event happened by its writer's clock; None where it doesn't say so."""
    try:
        at = datetime.fromisoformat(event["at"])
    except (KeyError, TypeError, ValueError):
        return None
    return at if at.tzinfo is not None else None


def _positive(value: object) -> float:
    """A number of seconds, 0 for what isn't one (of a damaged event, or one of another release)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and 0 < value < float("inf") else 0.0  # type: ignore[arg-type, operator]


def _held(changes: list[tuple[datetime, str]], members: list[_Span]) -> list[_Held]:
    """The stretches in which a seat was held. One still open, or whose end nobody could write any more,
    ends with the last that is known of it."""
    stretches: list[_Held] = []
    since: datetime | None = None
    lent = False
    for at, change in changes:
        if since is not None and at > since:
            stretches.append(_Held(since, at, lent))
        since, lent = (None, False) if change == "seat-released" else (at, change == "seat-lent")
    if since is not None and members and members[-1].stop > since:
        stretches.append(_Held(since, members[-1].stop, lent))
    if not changes and members:
        stretches.append(_Held(members[0].start, members[-1].stop, False))
    return stretches


def _gaps(held: list[_Held], members: list[_Span]) -> list[tuple[Kind, float]]:
    """What no member accounts for, piece by piece."""
    gaps: list[tuple[Kind, float]] = []
    for stretch in held:
        free_from, before = stretch.start, None
        for member in members:
            if member.start >= stretch.stop:
                break
            if member.start > free_from:
                gaps.append((_kind(stretch, before), (member.start - free_from).total_seconds()))
            free_from, before = max(free_from, member.stop), member
        if free_from < stretch.stop:
            gaps.append((_kind(stretch, before), (stretch.stop - free_from).total_seconds()))
    return gaps


def _kind(stretch: _Held, before: _Span | None) -> Kind:
    if stretch.lent:
        return "lent"
    return "idle" if before is not None and before.final else "restart"
