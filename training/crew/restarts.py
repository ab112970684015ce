"""When to try again to start a group, after the store was out of reach at its start.

The pause doubles from 1 s up to 30 s, and a random half of it is left out, as in `cluster.retry`. An
outage of minutes is waited for, and not held against the run; one of more than `retry_s` ends it.

A part of `training.crew.roster`, which owns it and passes the time in. Knows nothing of groups or stores.
"""

from __future__ import annotations

import math
from collections.abc import Callable

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0


class Restarts:
    """Starts that failed one after another.

    Args:
        retry_s: no try begins later than so many seconds after the first failure.
        uniform: gives a random number between two.
    """

    def __init__(self, retry_s: float, uniform: Callable[[float, float], float]) -> None:
        self._retry_s = retry_s
        self._uniform = uniform
        self._last_s = math.inf
        self._ceiling_s = FIRST_PAUSE_S
        self._due_s = -math.inf

    def failed(self, now_s: float) -> float | None:
        """A start has failed: the seconds to wait before the next, or None if there is to be none."""
        if self._last_s == math.inf:
            self._last_s = now_s + self._retry_s
        left_s = self._last_s - now_s
        if left_s <= 0:
            return None
        pause_s = min(self._uniform(self._ceiling_s / 2, self._ceiling_s), left_s)
        self._ceiling_s = min(2 * self._ceiling_s, LONGEST_PAUSE_S)
        self._due_s = now_s + pause_s
        return pause_s

    def due(self, now_s: float) -> bool:
        """Whether a start may be tried."""
        return now_s >= self._due_s

    def succeeded(self) -> None:
        """A start went well: the next failure is a first one."""
        self._last_s, self._ceiling_s, self._due_s = math.inf, FIRST_PAUSE_S, -math.inf
