"""How a replica tells its load through Ray Serve, which carries named numbers, and how they are read.

Serve keeps a time series for each name and replica. The newest value is the one that counts (the window is
the replica's own, see `serving.load`), and one that is old counts as none: its replica hangs or is gone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from serving.load import Load

PREFIX = "tandem_"
STALE_S = 10.0
_NAMES = tuple(field.name for field in fields(Load))


def written(load: Load) -> dict[str, float]:
    """The numbers of a load, by name; a capacity that isn't known is 0."""
    return {PREFIX + name: float(getattr(load, name) or 0.0) for name in _NAMES}


def read(raw: Mapping[str, Mapping[Any, Sequence[Any]]] | None, now_s: float) -> list[Load]:
    """The loads of those replicas that have reported lately.

    Args:
        raw: by name and replica, values with a `timestamp` and a `value`, the newest last.
        now_s: on the clock of the timestamps.
    """
    raw = raw or {}
    loads = []
    for replica, series in raw.get(PREFIX + _NAMES[0], {}).items():
        if not series or not now_s - float(series[-1].timestamp) < STALE_S:
            continue
        values = {name: _newest(raw.get(PREFIX + name, {}).get(replica)) for name in _NAMES}
        loads.append(
            Load(
                waiting_requests=int(values["waiting_requests"]),
                oldest_waiting_s=values["oldest_waiting_s"],
                busy_fraction=values["busy_fraction"],
                capacity_rows_per_s=values["capacity_rows_per_s"] or None,
                arrivals_per_s=values["arrivals_per_s"],
                arriving_rows_per_s=values["arriving_rows_per_s"],
                lost_per_s=values["lost_per_s"],
            )
        )
    return loads


def _newest(series: Sequence[Any] | None) -> float:
    """The last value, 0 where there is none or it isn't a number."""
    value = float(series[-1].value) if series else 0.0
    return value if math.isfinite(value) else 0.0
