"""Who is let in: the error for a full queue, with an honest Retry-After, and each request's deadline.

The rate is measured where it matters, rows per second of batches that ran, and forgets with a half-life
of some batches. Pure: state and numbers in, decisions out.
"""

from __future__ import annotations

import math

from cluster.errors import Overloaded, TooLarge

MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0
_WEIGHT_OF_NEWEST = 0.2
_MAX_TIMEOUT_CHARS = 32


class Admission:
    """The bounds of one replica's queue, and its measured speed."""

    def __init__(self, *, max_queue_rows: int) -> None:
        self._max_queue_rows = max_queue_rows
        self._row_s: float | None = None

    def ran(self, rows: int, duration_s: float) -> None:
        """Learn from a batch of `rows` that took `duration_s`."""
        if rows <= 0:
            return
        newest = duration_s / rows
        before = newest if self._row_s is None else self._row_s
        self._row_s = before + _WEIGHT_OF_NEWEST * (newest - before)

    def retry_after_s(self, waiting_rows: int) -> float:
        """When a queue of `waiting_rows` should have room: at least 1 s, at most 60 s."""
        estimate_s = waiting_rows * (self._row_s or 0.0)
        return min(max(estimate_s, MIN_RETRY_S), MAX_RETRY_S)

    def refusal(self, rows: int, waiting_rows: int) -> Overloaded | TooLarge:
        """The error for a request of `rows` that the queue, holding `waiting_rows`, has no room for."""
        if rows > self._max_queue_rows:
            return TooLarge(
                "the request has more rows than the queue holds",
                got=f"{rows} rows",
                allowed=f"at most {self._max_queue_rows} rows",
                fix="send the rows in several requests",
            )
        retry_after_s = self.retry_after_s(waiting_rows)
        return Overloaded(
            "the queue is full",
            retry_after_s=retry_after_s,
            got=f"{rows} rows on top of {waiting_rows} waiting",
            allowed=f"{self._max_queue_rows} rows waiting",
            fix=f"try again in {math.ceil(retry_after_s)} s, or let more replicas run",
        )


def deadline_s(now_s: float, slo_s: float, asked: bytes | None) -> float:
    """When a request that came at `now_s` is no longer worth running.

    Args:
        slo_s: the service's own limit.
        asked: the client's `x-request-timeout-seconds` header. It may ask for less time than the
            service gives, not for more; what isn't a positive number is passed over.
    """
    if asked is None or len(asked) > _MAX_TIMEOUT_CHARS:
        return now_s + slo_s
    try:
        wanted_s = float(asked)
    except ValueError:
        return now_s + slo_s
    return now_s + (min(slo_s, wanted_s) if wanted_s > 0 else slo_s)
