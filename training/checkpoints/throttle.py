"""How fast an upload goes: as fast as the steps don't feel, yet never too slow to end in time. Pure.

The trainer tells how long each step takes against a quiet one. The rate is then found as TCP finds its
own: doubled until a step first feels it, from then on raised by a little after some steps that don't, and
lowered by a share after each one that does. It stays from one upload to the next. Two things stand above:
a checkpoint has to be in the store before a set time, so that the rate has a floor; and where nobody steps,
as at a run's end, nothing holds it.

What was tried, 2 ranks on 2 cores that they need, 1.2 GB of state, a local directory. Steps' p95 while
uploading and what was lost of a minute, medians of 4 or 5 saves, lowest and highest:

    nice 19, 60 MB/s, page cache (before)           1.53 (1.31 to 1.76)   3.2% (2.6 to 3.4)   9 s
    idle priority, 60 MB/s, past the page cache     1.10 (1.09 to 1.15)   0.7% (0.7 to 0.8)   9 s
    the same without a limit                        1.23 (1.14 to 1.32)   0.7% (0.5 to 0.9)   3 s
    doubled whenever a step took less than 1.1      1.36 (1.12 to 1.41)   0.8% (0.4 to 1.5)   3 s

So most was won by using less of a core (`cluster.directory`) and only idle ones (`uploader`); the pace
spreads what is left. The last line is why the rate is raised only after several steps that were not slowed
at all: after every single such step uploads still went too fast at first, with 1.24 (1.22 to 1.46) and 1.0%
(0.8 to 1.2); only the fourth took as long as 60 MB/s does. What this came to has not been measured yet.

Knows no clock: the time is an argument, in seconds.
"""

from __future__ import annotations

import math

FIRST_MB_PER_S = 60.0
"""Before any step was heard of. With it, nobody who has given each rank a core of its own is disturbed."""
LOWEST_MB_PER_S = 20.0
HIGHEST_MB_PER_S = 4000.0
FELT = 1.1
"""A step that takes so many times a quiet one's time feels the upload."""
UNFELT = 1.03
"""And one that takes no more than this doesn't. In between, the rate is left as it is."""
NOBODY_STEPS = 0.0
"""Instead of a step's slowdown: nothing is disturbed until the next step is heard of."""
_RAISED_BY_MB_PER_S = 10.0
_LOWERED_TO = 0.7
_UNFELT_IN_A_ROW = 3
"""Before the rate is raised: one step may be quick by chance."""
_BYTES_PER_MB = 1_000_000


class Throttle:
    """The pace of one process's uploads. Its bytes go in pieces (files); a piece goes as fast as it can."""

    def __init__(self) -> None:
        self.mb_per_s = FIRST_MB_PER_S
        self._is_probing = True
        self._unfelt = 0
        self._is_alone = False
        self._limit_mb_per_s: float | None = None
        self._left_bytes = 0
        self._due_s = math.inf
        self._free_s = -math.inf

    def begin(self, size_bytes: int, *, now_s: float, within_s: float, mb_per_s: float | None = None) -> None:
        """An upload begins; one before it that has not ended is given up.

        Args:
            within_s: seconds until all of it should have gone.
            mb_per_s: a limit that holds whatever steps and time say.
        """
        self._left_bytes = size_bytes
        self._due_s = now_s + within_s
        self._limit_mb_per_s = mb_per_s
        self._free_s = now_s
        self._is_alone = False

    def heard(self, slowdown: float) -> None:
        """A step ended that took `slowdown` times a quiet one's time, or `NOBODY_STEPS`."""
        self._is_alone = slowdown == NOBODY_STEPS
        if self._is_alone:
            return
        self._unfelt = self._unfelt + 1 if slowdown <= UNFELT else 0
        if slowdown > FELT:
            self._is_probing = False
            self.mb_per_s = max(self.mb_per_s * _LOWERED_TO, LOWEST_MB_PER_S)
        elif slowdown > UNFELT:
            self._is_probing = False
        elif self._unfelt < _UNFELT_IN_A_ROW:
            return
        elif self._is_probing:
            self._unfelt = 0
            self.mb_per_s = min(self.mb_per_s * 2, HIGHEST_MB_PER_S)
        else:
            self._unfelt = 0
            self.mb_per_s = min(self.mb_per_s + _RAISED_BY_MB_PER_S, HIGHEST_MB_PER_S)

    def start_s(self, now_s: float) -> float:
        """When the next piece may go: now, or later."""
        if self._is_alone and self._limit_mb_per_s is None:
            return now_s
        return max(self._free_s, now_s)

    def goes(self, size_bytes: int, now_s: float) -> None:
        """A piece goes now: the next one when this one should have gone."""
        self._free_s = max(self._free_s, now_s) + size_bytes / (self._rate(now_s) * _BYTES_PER_MB)
        self._left_bytes -= size_bytes

    def is_late(self, now_s: float) -> bool:
        """Whether the floor is above what the steps allow: then their priority is no matter either."""
        return self._is_alone or self._floor(now_s) > self.mb_per_s

    def _rate(self, now_s: float) -> float:
        """In megabytes a second."""
        if self._limit_mb_per_s is not None:
            return self._limit_mb_per_s
        return max(self.mb_per_s, self._floor(now_s))

    def _floor(self, now_s: float) -> float:
        """What it takes to end in time."""
        if self._left_bytes <= 0 or math.isinf(self._due_s):
            return 0.0
        left_s = self._due_s - now_s
        return self._left_bytes / _BYTES_PER_MB / left_s if left_s > 0 else HIGHEST_MB_PER_S
