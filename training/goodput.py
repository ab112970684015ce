"""One training process's account of its time: at each instant it is of exactly one kind.

The loop says what begins (`switch`, or `during` around a block); the parts sum to the time since the
account was opened, by construction. What a process can't see itself, such as the time between a
death and the next process, is added from the coordinator's events (cluster.goodput).

Knows neither torch nor Ray.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.events import EventWriter
from cluster.goodput import KINDS, Kind

TELL_EVERY_S = 10.0
_OF_A_STEP = frozenset[Kind]({"compute", "data", "communication"})


class Account:
    """Seconds by kind since this was made. A switch costs about a microsecond.

    One thread switches; any thread may read `totals`.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK, kind: Kind = "restart") -> None:
        self.nonce = secrets.token_hex(4)
        """Tells this account from those of other processes, whose members may be called the same."""
        self._clock = clock
        self._lock = threading.Lock()
        self._kind: Kind = kind
        self._redoing = False
        self._begun_steps = 0
        self._seconds: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
        self._since_s = clock.monotonic_s()

    def switch(self, kind: Kind) -> Kind:
        """From now on it is time of `kind`; gives the kind that it was."""
        with self._lock:
            self._close()
            before, self._kind = self._kind, kind
            return before

    @contextmanager
    def during(self, kind: Kind) -> Iterator[None]:
        """The block is time of `kind`; after it, it is again what it was."""
        before = self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)

    def begin_step(self, step: int, reached: int = 0) -> None:
        """The step after `step` finished ones begins.

        Where it was begun before, by this process or (as far as `reached` tells: steps that anybody in
        the run has done) by another, all that it takes is `redone`.
        """
        with self._lock:
            self._close()
            self._begun_steps = max(self._begun_steps, reached)
            self._redoing = step < self._begun_steps
            self._begun_steps = max(self._begun_steps, step + 1)

    def move(self, seconds: float, source: Kind, to: Kind) -> None:
        """Book what was `source` as `to`: for time that is measured from outside, such as the exposed part
        of an exchange inside a backward pass. Never more than there is."""
        with self._lock:
            self._close()
            source, to = self._booked(source), self._booked(to)
            seconds = min(max(seconds, 0.0), self._seconds[source])
            self._seconds[source] -= seconds
            self._seconds[to] += seconds

    def totals(self) -> dict[Kind, float]:
        """Seconds by kind up to now."""
        with self._lock:
            self._close()
            return dict(self._seconds)

    def _booked(self, kind: Kind) -> Kind:
        return "redone" if self._redoing and kind in _OF_A_STEP else kind

    def _close(self) -> None:
        now_s = self._clock.monotonic_s()
        self._seconds[self._booked(self._kind)] += now_s - self._since_s
        self._since_s = now_s


class AccountTeller:
    """Writes a member's account as events: about every 10 s, and whenever it is told to."""

    def __init__(
        self, account: Account, events: EventWriter, member: str, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._account = account
        self._events = events
        self._member = member
        self._clock = clock
        self._told_s = clock.monotonic_s()

    def tell_if_due(self, *, generation: int, rank: int) -> None:
        """Call it after each step; nearly free while it isn't time."""
        if self._clock.monotonic_s() - self._told_s >= TELL_EVERY_S:
            self.tell(generation=generation, rank=rank)

    def tell(self, *, generation: int, rank: int, final: bool = False) -> None:
        """Write it now: when the member leaves its group, above all. `final` says that its work is done."""
        self._told_s = self._clock.monotonic_s()
        seconds = {kind: round(value, 4) for kind, value in self._account.totals().items() if value}
        self._events.write(
            "account",
            member=self._member,
            account=self._account.nonce,
            generation=generation,
            rank=rank,
            seconds=seconds,
            final=final,
        )
