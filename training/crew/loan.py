"""A loan of some of a run's workers: from the request, over their handing over, to their return.

A part of `training.crew.places`, which owns it. Its time is counted from when what is lent is free: Ray Train
may take seconds to let go of it, and a loan that ended meanwhile would be no loan, but a group that shrinks
and grows for nothing. Knows numbers only, neither seats nor processes.
"""

from __future__ import annotations

import math

from cluster.errors import BadInput
from training.crew.roles import Rules


class Loan:
    """One at a time; whoever owns it tells it what is held and what is asked for."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._of = 0
        self._for_s = 0.0
        self._until_s = math.inf
        self._handed_over = False
        self.workers = 0
        """Lent now, or asked for and soon to be; 0 without a loan."""

    @property
    def limit(self) -> int:
        """How many workers the run may have now."""
        return self._of - self.workers if self.workers else self._rules.max_workers

    def begin(self, workers: int, for_s: float, held: int) -> None:
        """Lend `workers` of `held`, for `for_s` seconds from when they are free.

        Raises:
            BadInput: the rest would be fewer than `workers.min`, or some are lent already.
        """
        run, least = self._rules.run, self._rules.min_workers
        if self.workers:
            raise BadInput(
                f"run '{run}' has lent {self.workers} already",
                got=f"{workers} more",
                fix="wait for their return, or take them back first",
            )
        if not 0 < workers <= held - least:
            raise BadInput(
                f"run '{run}' can't lend so many workers",
                got=f"{workers} of {held}",
                allowed=f"what leaves it at least {least} (workers.min)",
                fix="ask for fewer, or run with a smaller workers.min",
            )
        self.workers, self._of = workers, held
        self._for_s, self._until_s, self._handed_over = for_s, math.inf, False

    def end(self, now_s: float) -> None:
        """Take back what is lent, now."""
        self._until_s = min(self._until_s, now_s)

    def left_s(self, now_s: float) -> float:
        """For how long it goes on; 0 without a loan."""
        if not self.workers:
            return 0.0
        return self._for_s if self._until_s == math.inf else max(0.0, self._until_s - now_s)

    def handed_over(self, workers: int) -> bool:
        """Whether with this request for so many workers the loan is handed over; true once a loan."""
        if not self.workers or workers != self.limit or self._handed_over:
            return False
        self._handed_over = True
        return True

    def over(self, held: int, now_s: float) -> bool:
        """Whether it has just ended, `held` workers' resources being held now; true once a loan."""
        if not self.workers:
            return False
        if self._until_s == math.inf and 0 < held <= self.limit:
            self._until_s = now_s + self._for_s
        if now_s < self._until_s:
            return False
        self.workers = 0
        if not self._handed_over:
            self._of = 0  # taken back before anything was given: nothing has to return
        return True

    def returned(self, world: int) -> bool:
        """Whether with `world` workers at work, what was lent is back; true once a loan."""
        back = not self.workers and 0 < self._of <= world
        if back:
            self._of = 0
        return back
