"""What a scaling policy is shown of a model at one moment; the same for Ray Serve and for the simulator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from serving.load import Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """All replicas of a model together, now. Rates are means over the last seconds."""

    ready: int
    """Replicas that take requests."""
    starting: int = 0
    """Replicas that were asked for and aren't ready."""
    arriving_rows_s: float = 0.0
    """Rows that came, a second, those refused included."""
    lost_rows_s: float = 0.0
    """Of them: refused, dropped or answered too late."""
    waiting_rows: float = 0.0
    """Rows in the replicas' queues, and held at the door where there is no replica."""
    oldest_waiting_s: float = 0.0
    busy_fraction: float = 0.0
    """Mean over the replicas, 0 to 1."""
    capacity_rows_s: float | None = None
    """What one replica can keep up with and answer in time; None: not learned yet."""
    in_flight: float = 0.0
    """Requests waiting or running: what other systems' policies read."""

    def sane(self) -> Seen:
        """The same, every number finite and within its range; what isn't a number counts as nothing."""
        capacity = self.capacity_rows_s
        arriving = _number(self.arriving_rows_s)
        return Seen(
            ready=int(_number(self.ready)),
            starting=int(_number(self.starting)),
            arriving_rows_s=arriving,
            lost_rows_s=min(_number(self.lost_rows_s), arriving),
            waiting_rows=_number(self.waiting_rows),
            oldest_waiting_s=_number(self.oldest_waiting_s),
            busy_fraction=min(_number(self.busy_fraction), 1.0),
            capacity_rows_s=_number(capacity) or None if capacity is not None else None,
            in_flight=_number(self.in_flight),
        )


def together(loads: Sequence[Load], *, ready: int, starting: int, held: float = 0.0) -> Seen:
    """What the replicas report, as one.

    Args:
        loads: of those replicas that have reported lately.
        ready: replicas that take requests; those that haven't reported are taken to be like the others.
        starting: replicas that were asked for and aren't ready.
        held: requests that wait in front of the replicas.
    """
    rows = sum(_number(load.arriving_rows_per_s) for load in loads)
    requests = sum(_number(load.arrivals_per_s) for load in loads)
    rows_a_request = rows / requests if requests > 0 else 1.0
    waiting = sum(_number(load.waiting_requests) for load in loads) + _number(held)
    capacities = [c for load in loads if (c := _number(load.capacity_rows_per_s or 0.0)) > 0]
    return Seen(
        ready=ready,
        starting=starting,
        arriving_rows_s=rows,
        lost_rows_s=sum(_number(load.lost_per_s) for load in loads) * rows_a_request,
        waiting_rows=waiting * rows_a_request,
        oldest_waiting_s=max((_number(load.oldest_waiting_s) for load in loads), default=0.0),
        busy_fraction=_mean([_number(load.busy_fraction) for load in loads]),
        capacity_rows_s=_mean(capacities) or None,
        in_flight=waiting + sum(_number(load.busy_fraction) for load in loads),
    ).sane()


def _number(value: float) -> float:
    """`value` where it is finite and above zero, else 0; nothing larger than 1e12."""
    return min(float(value), 1e12) if math.isfinite(value) and value > 0 else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
