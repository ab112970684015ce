"""How busy a replica is: what scaling reads, and the sliding window that measures it.

Rates are of the last `WINDOW_S` seconds, in buckets of half a second, so that reading them costs no
more than ten additions. Pure: numbers and `now_s` in, numbers out. Knows nothing of what is decided on them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

WINDOW_S = 5.0
_BUCKET_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One replica, now. Rates are means over the last `WINDOW_S` seconds, or since the start if shorter."""

    waiting_requests: int
    oldest_waiting_s: float
    """How long the oldest request in the queue has waited; 0 where nothing waits."""
    busy_fraction: float
    """Of the time of all slots, how much they ran batches: 0 to 1."""
    capacity_rows_per_s: float | None
    """What the replica could do with its best batch within the SLO, by the latency it has learned, at the
    mean length of recent requests. None until it has learned anything."""
    arrivals_per_s: float
    """Requests that came, those that were refused included."""
    arriving_rows_per_s: float
    """Their rows."""
    lost_per_s: float
    """Requests that were refused, ran out of time before they ran, or were answered too late."""


@dataclass(slots=True)
class _Bucket:
    start_s: float
    requests: int = 0
    rows: int = 0
    lost: int = 0
    busy_s: float = 0.0


@dataclass(slots=True)
class LoadWindow:
    """Counts of the last seconds. `now_s` never goes back.

    Args:
        started_s: when counting begins, so that the first seconds aren't diluted.
    """

    started_s: float
    _buckets: deque[_Bucket] = field(default_factory=deque)

    def arrived(self, now_s: float, rows: int) -> None:
        """A request came."""
        bucket = self._current(now_s)
        bucket.requests += 1
        bucket.rows += rows

    def lost(self, now_s: float, requests: int = 1) -> None:
        """Requests were refused, dropped or late."""
        self._current(now_s).lost += requests

    def ran(self, now_s: float, duration_s: float) -> None:
        """A slot has been busy for `duration_s` until now; counted where it was spent."""
        self._current(now_s)
        stop_s = now_s
        for bucket in reversed(self._buckets):
            spent_s = min(duration_s, max(0.0, stop_s - bucket.start_s))
            bucket.busy_s += spent_s
            duration_s -= spent_s
            stop_s = bucket.start_s
            if duration_s <= 0:
                return

    def rates(self, now_s: float) -> tuple[float, float, float, float]:
        """Requests, rows and lost requests a second, and busy slot-seconds a second."""
        self._current(now_s)
        span_s = max(min(now_s - self.started_s, now_s - self._buckets[0].start_s), _BUCKET_S)
        total = _Bucket(0.0)
        for bucket in self._buckets:
            total.requests += bucket.requests
            total.rows += bucket.rows
            total.lost += bucket.lost
            total.busy_s += bucket.busy_s
        return total.requests / span_s, total.rows / span_s, total.lost / span_s, total.busy_s / span_s

    def _current(self, now_s: float) -> _Bucket:
        """The bucket of now; those that are older than the window go, and gaps are filled."""
        start_s = now_s - now_s % _BUCKET_S
        first_s = start_s - WINDOW_S + _BUCKET_S
        while self._buckets and self._buckets[0].start_s < first_s:
            self._buckets.popleft()
        next_s = self._buckets[-1].start_s + _BUCKET_S if self._buckets else max(first_s, self._begin_s())
        while next_s <= start_s:
            self._buckets.append(_Bucket(next_s))
            next_s += _BUCKET_S
        return self._buckets[-1]

    def _begin_s(self) -> float:
        return self.started_s - self.started_s % _BUCKET_S
