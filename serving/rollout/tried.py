"""A trial as one replica runs it: who gets the candidate, and what is seen of both versions.

Lives on the replica's event loop; `snapshot` alone is for other threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.trial import Trial
from serving.rollout.evidence import Evidence, Side
from serving.rollout.split import Split

T = TypeVar("T")


class Tried(Generic[T]):
    """One step of a trial.

    Args:
        trial: as it stands in the log.
        candidate: the loaded candidate, None where it could not be loaded.
        broken: why not.
        start: in [0, 1), as `Split` takes it.
    """

    def __init__(
        self,
        trial: Trial,
        candidate: T | None,
        broken: str | None = None,
        *,
        start: float = 0.0,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.trial = trial
        self.candidate = candidate
        self.evidence = Evidence(broken=broken)
        self._clock = clock
        self._began_s = clock.monotonic_s()
        self._split = Split(trial.percent, salt=str(trial.began).encode(), start=start)
        self._shadowing: asyncio.Task[None] | None = None

    @property
    def lasted_s(self) -> float:
        """How long this replica has known the step."""
        return self._clock.monotonic_s() - self._began_s

    def chosen(self, caller: bytes | None) -> T | None:
        """The candidate, where it is to answer the next request; None: the version in service."""
        if self.candidate is None or self.trial.mode != "canary" or not self._split.takes(caller):
            return None
        return self.candidate

    def side(self, of: object) -> Side:
        """Where to count what `of`, a loaded version, did."""
        return self.evidence.candidate if of is self.candidate else self.evidence.stable

    def shadow(self, ask: Callable[[T], Awaitable[None]]) -> None:
        """Let the candidate answer a copy, one at a time: copies that come meanwhile are left out.

        Args:
            ask: runs the copy on the candidate and counts what comes of it.
        """
        if self.candidate is None or self.trial.mode != "shadow" or self._shadowing is not None:
            return
        if self._split.takes():
            self._shadowing = asyncio.ensure_future(ask(self.candidate))
            self._shadowing.add_done_callback(self._shadowed)

    def snapshot(self) -> Evidence:
        """A copy of what was seen so far."""
        return self.evidence.model_copy(deep=True)

    def _shadowed(self, task: asyncio.Task[None]) -> None:
        self._shadowing = None
        if not task.cancelled() and task.exception() is not None:
            self.evidence.candidate.broke()
