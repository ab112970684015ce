"""Time as a parameter: wall time for people's eyes, monotonic time for intervals.

Nothing in Tandem orders events, expires a lease or picks a "latest" by wall time; clocks on
different machines disagree. Tests pass a clock of their own.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Where a component gets the time from."""

    def wall(self) -> datetime:
        """Now, as an aware UTC datetime. For records that people read."""
        ...

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary point of this process. For intervals and deadlines."""
        ...

    def sleep(self, duration_s: float) -> None:
        """Wait `duration_s` seconds."""
        ...


class SystemClock:
    """The machine's own clock."""

    def wall(self) -> datetime:
        return datetime.now(UTC)

    def monotonic_s(self) -> float:
        return time.monotonic()

    def sleep(self, duration_s: float) -> None:
        time.sleep(duration_s)


SYSTEM_CLOCK = SystemClock()
