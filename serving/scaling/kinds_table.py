"""Where the policies of a model's two kinds of replica meet, in Ray Serve's controller.

Each kind is an application of its own, so each has a policy object of its own; both are called in turn in the
controller's loop. Whoever is called when it is time, and both have been looked at, decides for both. A
controller that starts anew makes new objects, which find a new table.

A file apart from `kinds_on_serve`: Ray Serve copies a policy's own module for each of its objects (it is
pickled by value), so what objects are to share must lie in another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from serving.scaling.kinds import State, Terms, decide
from serving.scaling.observed import Seen
from serving.scaling.policy import Settings

_EVERY_S = 0.5
_FRESH_S = 5.0
"""What was seen of the other kind is good for so long."""


@dataclass(frozen=True, slots=True)
class Look:
    """A kind when its policy was last called; `seen` is None where its replicas haven't reported."""

    at_s: float
    target: int
    seen: Seen | None
    scaled_up_s: float | None
    """When Serve last did, on the clock of `at_s`."""


@dataclass(slots=True)
class Table:
    """What is known of both kinds, and what is wanted of each."""

    state: State = field(default_factory=State)
    _looks: list[Look | None] = field(default_factory=lambda: [None, None])
    _wanted: tuple[int, ...] | None = None
    _decided_s: float | None = None

    def decide(self, settings: Settings, terms: Sequence[Terms], kind: int, look: Look) -> int:
        """Replicas wanted of a kind, now that it is seen like this."""
        self._looks[kind] = look
        if self._decided_s is None or look.at_s - self._decided_s >= _EVERY_S:
            self._decide_for_both(settings, terms, look.at_s)
        return look.target if self._wanted is None or look.seen is None else self._wanted[kind]

    def _decide_for_both(self, settings: Settings, terms: Sequence[Terms], now_s: float) -> None:
        looks = [look for look in self._looks if look is not None and now_s - look.at_s < _FRESH_S]
        seen = [look.seen for look in looks if look.seen is not None]
        if len(seen) < len(terms):
            self._wanted = None  # nothing is known of some, so nothing is changed
            return
        state = _learn_of_starts(self.state, looks)
        decision = decide(settings, terms, state, seen, [look.target for look in looks], now_s)
        self.state, self._wanted, self._decided_s = decision.state, decision.wanted, now_s


_tables: dict[str, Table] = {}


def table_of(group: str) -> Table:
    """The table of the model whose name for this is `group`."""
    return _tables.setdefault(group, Table())


def _learn_of_starts(state: State, looks: Sequence[Look]) -> State:
    """A start from zero, which Serve decided without us."""
    kinds = []
    for kind, look in zip(state.kinds, looks, strict=True):
        starts = kind.starts
        woken = look.seen is not None and starts.ready == 0 < look.seen.ready and not starts.pending
        if woken and look.scaled_up_s is not None:
            starts = replace(starts, pending=(look.scaled_up_s,))
        kinds.append(replace(kind, starts=starts))
    return replace(state, kinds=tuple(kinds))
