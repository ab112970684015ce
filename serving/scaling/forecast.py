"""How many rows a second to be ready for, one cold start from now. Three ways; pure.

What is started now helps one cold start later, so that is the load to provide for. `rises` is the one in
use: what the traffic itself has done over a cold start, lately, says how much it may rise over the next.
`level` (nothing changes) is late by a cold start on every rise, and `trend` (it goes on as it did) runs
past every peak: `tandem simulate TRACE --policy ours,ours-level,ours-trend` shows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

Rates = Sequence[float]
"""Rows a second, one for each second, the newest last."""

_SHORT = 5
_TREND = 30
_FEW = 60
"""Seconds of history below which rises aren't known, and a cautious rise is assumed."""
_CAUTIOUS_RISE = 2.0
_MOST_RISE = 3.0


def level(rates: Rates, horizon_s: float, caution: float) -> float:
    """The load stays: the mean of the last seconds."""
    return _mean(rates[-_SHORT:])


def trend(rates: Rates, horizon_s: float, caution: float) -> float:
    """The load goes on rising as it has in the last half minute; a fall isn't followed."""
    recent = rates[-_TREND:]
    now = level(rates, horizon_s, caution)
    if len(recent) < 2:
        return now
    middle_s, mean = (len(recent) - 1) / 2, _mean(recent)
    spread = sum((at - middle_s) ** 2 for at in range(len(recent)))
    slope = sum((at - middle_s) * (rate - mean) for at, rate in enumerate(recent)) / spread
    return now + max(0.0, slope) * horizon_s


def rises(rates: Rates, horizon_s: float, caution: float) -> float:
    """The load now, times the rise over a horizon that only `1 - caution` of the past's were above.

    Rises are taken as ratios, at a few moments for each horizon, over the history that is kept. They are
    softened by a little load, so that the first request after an idle minute isn't an endless rise.
    """
    now = level(rates, horizon_s, caution)
    if now <= 0:
        return 0.0
    ahead = max(1, math.ceil(horizon_s))
    if len(rates) < _FEW + ahead:
        return now * _CAUTIOUS_RISE
    history = np.asarray(rates)
    soft = 0.25 * float(history.mean())
    peaks = sliding_window_view(history[_SHORT:], ahead).max(axis=1)
    before = sliding_window_view(history, _SHORT).mean(axis=1)[: peaks.size]
    step = max(1, ahead // 4)
    seen = np.sort((peaks[::step] + soft) / (before[::step] + soft))
    ratio = float(seen[min(seen.size - 1, int(caution * seen.size))])
    return now * min(max(ratio, 1.0), _MOST_RISE)


FORECASTS: dict[str, Callable[[Rates, float, float], float]] = {
    "level": level,
    "trend": trend,
    "rises": rises,
}


def _mean(values: Rates) -> float:
    return sum(values) / len(values) if values else 0.0
