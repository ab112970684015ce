"""The losses of a run's steps: gathered from all ranks now and then, and judged.

Judging each step at once would have every step wait for an exchange; so a step that ruins the weights is
found up to ten steps later. Where a group breaks before that, each rank judges for itself.

Knows nothing of what is done about it.
"""

from __future__ import annotations

import math
import statistics
from collections import deque

import torch
import torch.distributed as dist

_RECENT_LOSSES = 100
_FEWEST_TO_JUDGE_A_SPIKE = 20


class Poisoned(Exception):
    """A step ruined the weights: its loss or gradient is not finite, or a spike. Every rank raises it.

    It reaches no user: whoever runs the loop goes back behind the step, or gives up (`RunFailed`).
    """

    def __init__(self, failed: str, *, loss: float, step: int, start: int, stop: int) -> None:
        super().__init__(failed)
        self.failed = failed
        self.loss = loss
        self.step = step
        """The step that did it, counted from 1."""
        self.start = start
        """Rows [start, stop) by the cursor: its batch."""
        self.stop = stop


class Losses:
    """One rank's: the losses since the last report, exchanged between ranks only when they are asked for."""

    def __init__(self, device: torch.device, world: int, spike_factor: float | None) -> None:
        self._device = device
        self._world = world
        self._spike_factor = spike_factor
        self._steps: list[tuple[int, int, int]] = []
        self._parts: list[torch.Tensor] = []
        self._recent: deque[float] = deque(maxlen=_RECENT_LOSSES)

    def add(self, step: int, start: int, stop: int, part: torch.Tensor) -> None:
        """Note this rank's part of a step's loss, without waiting for it to be computed.

        Args:
            start, stop: the step's rows [start, stop) by the cursor.
            part: one number; not finite where the gradient, which is the same on every rank, is not.
        """
        self._steps.append((step, start, stop))
        self._parts.append(part)

    def reduce(self) -> float | None:
        """The mean loss of the steps since the last call; None if each was skipped.

        Raises:
            Poisoned: one of them ruined the weights.
        """
        if not self._parts:
            return None
        losses_S = torch.stack(self._parts)
        if self._world > 1:
            dist.all_reduce(losses_S)
        values = losses_S.tolist()
        steps, self._steps, self._parts = self._steps, [], []
        for (step, start, stop), loss in zip(steps, values, strict=True):
            why = self._ruinous(step, loss)
            if why:
                raise Poisoned(why, loss=loss, step=step, start=start, stop=stop)
            self._recent.append(loss)
        return math.fsum(values) / len(values)

    def are_in_doubt(self) -> bool:
        """Whether a step since the last `reduce` may have ruined the weights, as far as one rank can tell.

        A gradient that is not finite is known to each rank. A spike is not, and passes. On an accelerator the
        host runs ahead of exchanges, and steps go on with whatever a broken one left; so there any such
        step is in doubt.
        """
        if not self._parts:
            return False
        ran_ahead = self._world > 1 and self._device.type != "cpu"
        return ran_ahead or not bool(torch.stack(self._parts).isfinite().all())

    def _ruinous(self, step: int, loss: float) -> str:
        if not math.isfinite(loss):
            return f"the loss or its gradient is not a finite number at step {step}"
        if self._spike_factor is not None and len(self._recent) >= _FEWEST_TO_JUDGE_A_SPIKE:
            usual = statistics.median(self._recent)
            if loss > self._spike_factor * usual:
                return f"the loss at step {step} is over {self._spike_factor:g} times the usual {usual:.4g}"
        return ""
