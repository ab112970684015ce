"""When the next checkpoint is due: by steps, by time, or by what saving turns out to cost.

Rank 0's alone; the other ranks are told (training.agree).
"""

from __future__ import annotations

from cluster.clock import Clock
from training.checkpoints.interval import AutoInterval
from training.recipe import Checkpointing


class SaveClock:
    """Says when to save, counted from when it was made, or from the last save.

    Args:
        step: steps done.
        failures: how often the run's workers failed so far, as far as is known.
    """

    def __init__(self, policy: Checkpointing, step: int, failures: int, clock: Clock) -> None:
        self._policy = policy
        self._clock = clock
        self._step = step
        self._began_s = self._saved_s = clock.monotonic_s()
        self._auto = AutoInterval(failures)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint of the state after `step` is due."""
        every_steps = self._policy.every_steps
        if every_steps is not None and step - self._step >= every_steps:
            return True
        every_s = self._every_s()
        return every_s is not None and self._clock.monotonic_s() - self._saved_s >= every_s

    def saved(self, step: int, blocking_s: float, upload_s: float) -> None:
        """A checkpoint of `step` was begun, and held up the steps for `blocking_s`; the one before took
        `upload_s` until it was in the store."""
        self._step = step
        self._auto.saved(blocking_s, upload_s)
        self._saved_s = self._clock.monotonic_s()

    def _every_s(self) -> float | None:
        if self._policy.every_s == "auto":
            return self._auto.next_s(self._clock.monotonic_s() - self._began_s)
        return self._policy.every_s
