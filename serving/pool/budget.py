"""Which models a replica keeps: a budget of bytes, least recently used first out, never one that is in use.

Pure bookkeeping: whoever loads a model first asks for room (`want`), and `step` says who may go on and which
models must go. Room is free again only when it is given back (`release`), so what is held never exceeds the
budget, not even while a model is being evicted. Those who wait are served in order: were smaller ones let
past, a large model could wait for ever.

Knows nothing of loading, time or HTTP.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from cluster.errors import NotReady

TOO_LARGE_RETRY_S = 60.0


@dataclass(frozen=True, slots=True, eq=False)
class Grant:
    """Room for one version of a model, asked for or held."""

    model: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be done now: grants that hold from here on, and models to evict."""

    granted: tuple[Grant, ...]
    evict: tuple[str, ...]


class Budget:
    """The bytes of one replica.

    Args:
        limit_bytes: what all models together may hold.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._held: dict[Grant, None] = {}
        self._waiting: deque[Grant] = deque()
        self._uses: Counter[str] = Counter()
        self._order: dict[str, None] = {}
        """Models by their last use, the oldest first."""
        self._leaving: set[Grant] = set()
        """Held, and about to be released: their models are being evicted."""

    @property
    def held_bytes(self) -> int:
        """What is held, by those that are being evicted too."""
        return sum(grant.size_bytes for grant in self._held)

    def bytes_of(self, model: str) -> int:
        """What a model holds, in all its versions."""
        return sum(grant.size_bytes for grant in self._held if grant.model == model)

    def in_use(self, model: str) -> bool:
        """Whether it must not be evicted."""
        return self._uses[model] > 0

    def enter(self, model: str) -> None:
        """Someone uses the model, or waits for it, until `leave`."""
        self._uses[model] += 1
        self._touch(model)

    def leave(self, model: str) -> None:
        """One of its users is done."""
        assert self._uses[model] > 0, "left more often than entered"
        self._uses[model] -= 1
        self._touch(model)

    def want(self, model: str, size_bytes: int) -> Grant:
        """Queue for room; `step` says when there is some.

        Raises:
            NotReady: it could never have so much.
        """
        if size_bytes > self.limit_bytes:
            raise NotReady(
                f"model '{model}' is larger than the whole pool",
                retry_after_s=TOO_LARGE_RETRY_S,
                got=f"{size_bytes} bytes",
                allowed=f"at most {self.limit_bytes} bytes",
                fix="raise pool.memory_gib, or give the model replicas of its own",
            )
        grant = Grant(model, size_bytes)
        self._waiting.append(grant)
        return grant

    def could_have(self, model: str, size_bytes: int) -> bool:
        """Whether room would be found without waiting for a model that is in use, or behind someone."""
        idle_bytes = sum(self._staying_bytes(name) for name in self._idle(model))
        room_bytes = self._free_bytes + self._leaving_bytes + idle_bytes
        return not self._waiting and size_bytes <= room_bytes

    def withdraw(self, grant: Grant) -> None:
        """It is no longer wanted; it must not hold yet."""
        self._waiting.remove(grant)

    def release(self, grant: Grant) -> None:
        """Its memory is free again."""
        del self._held[grant]
        self._leaving.discard(grant)

    def drop(self, model: str) -> bool:
        """Let a model go although there is room. False: it is in use, going already, or not here."""
        if self.in_use(model) or not self._staying_bytes(model):
            return False
        self._go(model)
        return True

    def step(self) -> Step:
        """Grant what there is room for, and choose whom to evict for the next in line.

        Nobody is evicted where that would not be enough: the others in use must end first.
        """
        granted = []
        while self._waiting and self._waiting[0].size_bytes <= self._free_bytes:
            grant = self._waiting.popleft()
            self._held[grant] = None
            granted.append(grant)
        evict = self._victims(self._waiting[0]) if self._waiting else ()
        for model in evict:
            self._go(model)
        return Step(tuple(granted), evict)

    @property
    def _free_bytes(self) -> int:
        return self.limit_bytes - self.held_bytes

    @property
    def _leaving_bytes(self) -> int:
        return sum(grant.size_bytes for grant in self._leaving)

    def _staying_bytes(self, model: str) -> int:
        return sum(g.size_bytes for g in self._held if g.model == model and g not in self._leaving)

    def _go(self, model: str) -> None:
        self._leaving |= {grant for grant in self._held if grant.model == model}

    def _idle(self, besides: str) -> list[str]:
        """Models that may be evicted, the least recently used first."""
        staying = {grant.model for grant in self._held if grant not in self._leaving} - {besides}
        return [model for model in self._order if model in staying and not self.in_use(model)]

    def _victims(self, grant: Grant) -> tuple[str, ...]:
        missing_bytes = grant.size_bytes - self._free_bytes - self._leaving_bytes
        victims = []
        for model in self._idle(grant.model):
            if missing_bytes <= 0:
                break
            victims.append(model)
            missing_bytes -= self._staying_bytes(model)
        return tuple(victims) if missing_bytes <= 0 else ()

    def _touch(self, model: str) -> None:
        self._order.pop(model, None)
        self._order[model] = None
