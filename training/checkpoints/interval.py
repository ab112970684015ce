"""How long to train between two saves, from what saves cost and how often training fails. Pure.

A save costs `blocking_s` of everyone's time; a failure costs the work since the last save, on average
half an interval. The interval that loses least in sum is about sqrt(2 · blocking_s · time between
failures) (Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974),
for which Daly gives the next terms ("A higher order estimate of the optimum checkpoint interval for
restart dumps", FGCS 22(3), 2006). How often training fails is not known when it begins: one failure a
day is assumed, and counts as much as one day of watching.

Two things stand above that sum: saves cost at most 1% of the time, and one has left the machine before
the next begins.
"""

from __future__ import annotations

import math
from collections import deque

FIRST_S = 60.0
"""Before anything was measured."""
SHORTEST_S = 5.0
LONGEST_S = 1800.0
"""However cheap failures seem: nobody likes to lose more than half an hour."""
COST_AT_MOST = 0.01
_UPLOAD_SHARE_AT_MOST = 0.8
_ASSUMED_FAILURES = 1
_ASSUMED_WITHIN_S = 86_400.0
_RECENT_SAVES = 5


def next_save_s(
    *, blocking_s: float, upload_s: float, failures: int, watched_s: float, longest_s: float = LONGEST_S
) -> float:
    """Seconds from the beginning of one save to the next.

    Args:
        blocking_s: for how long a save holds up the steps.
        upload_s: how long it takes from then until the checkpoint is committed.
        failures: how often training failed so far.
        watched_s: for how long it was watched for that.
        longest_s: the longest interval, unless the two bounds above demand a longer one.
    """
    between_failures_s = (_ASSUMED_WITHIN_S + watched_s) / (_ASSUMED_FAILURES + failures)
    wanted_s = min(max(_daly_s(blocking_s, between_failures_s), SHORTEST_S), longest_s)
    return max(wanted_s, blocking_s / COST_AT_MOST, (blocking_s + upload_s) / _UPLOAD_SHARE_AT_MOST)


def _daly_s(cost_s: float, between_failures_s: float) -> float:
    """Daly's equation 37: the optimal interval from save to save, its own cost included."""
    if cost_s >= 2 * between_failures_s:
        return between_failures_s
    share = cost_s / (2 * between_failures_s)
    return math.sqrt(2 * cost_s * between_failures_s) * (1 + math.sqrt(share) / 3 + share / 9)


class AutoInterval:
    """What was measured so far in one group of workers, and the interval that follows from it.

    The slowest of the last five saves counts, so that one lucky save makes nobody overlap.
    """

    def __init__(self, failures: int = 0, watched_s: float = 0.0) -> None:
        self._failures = failures
        self._watched_before_s = watched_s
        self._blocking_s: deque[float] = deque(maxlen=_RECENT_SAVES)
        self._upload_s: deque[float] = deque(maxlen=_RECENT_SAVES)

    def saved(self, blocking_s: float, upload_s: float) -> None:
        """A save was made; `upload_s` may be that of the one before, 0 where there is none yet."""
        self._blocking_s.append(blocking_s)
        self._upload_s.append(upload_s)

    def next_s(self, watched_s: float) -> float:
        """Seconds from the beginning of the last save to the next one.

        Args:
            watched_s: for how long this group has trained.
        """
        if not self._blocking_s:
            return FIRST_S
        return next_save_s(
            blocking_s=max(self._blocking_s),
            upload_s=max(self._upload_s),
            failures=self._failures,
            watched_s=self._watched_before_s + watched_s,
        )
