"""How long a step takes when nothing is uploaded, and how long an upload may take for the steps' sake. Pure.

The quiet time is a median of recent steps, so that neither a first step nor a slow batch sets it. An upload
may take half the time until the next save, as far as that is known, and half of what a failing store is
given: the other half is for what goes wrong.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from training.checkpoints.interval import FIRST_S
from training.recipe import Checkpointing

FEWEST = 3
"""Quiet steps before one can be called slow."""
_RECENT = 21
_SHARE = 0.5


class Calm:
    """What one group of workers knows of its steps. `now_s`: when it was made, in seconds."""

    def __init__(self, policy: Checkpointing, now_s: float) -> None:
        every_s = FIRST_S if policy.every_s == "auto" else policy.every_s
        self._longest_s = min(policy.retry_s, every_s or policy.retry_s)
        self._by_steps = policy.every_steps is not None
        self._saved_s = now_s
        self._quiet_s: deque[float] = deque(maxlen=_RECENT)

    def stepped(self, step_s: float, *, is_quiet: bool) -> float | None:
        """A step took `step_s`.

        Args:
            is_quiet: nothing was being uploaded, as far as is known.

        Returns:
            How many times a quiet one's time it took; None for a quiet one, and as long as that is unknown.
        """
        if is_quiet:
            self._quiet_s.append(step_s)
            return None
        if len(self._quiet_s) < FEWEST or step_s <= 0:
            return None
        return step_s / max(median(self._quiet_s), 1e-9)

    def saves(self, now_s: float) -> float:
        """A save begins; how long its upload may take, in seconds.

        Where saves are due by steps, the time since the last one is taken for the time until the next.
        """
        gap_s, self._saved_s = now_s - self._saved_s, now_s
        between_s = min(self._longest_s, gap_s) if self._by_steps else self._longest_s
        return _SHARE * between_s
