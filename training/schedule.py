"""The learning rate as a pure function of the step, so that resuming needs nothing but the step."""

from __future__ import annotations

import math

from training.recipe import Optimization


def learning_rate(step: int, total_steps: int, optimization: Optimization) -> float:
    """Linear warm-up, then half a cosine down to `min_learning_rate_ratio` of the peak.

    The cosine is that of SGDR (Loshchilov and Hutter, 2017) without restarts.

    Args:
        step: counted from 0.
        total_steps: of the whole run.
    """
    peak = optimization.learning_rate
    warmup = min(optimization.warmup_steps, total_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    floor = optimization.min_learning_rate_ratio
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
