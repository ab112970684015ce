"""The load of a pool's replica, from the loads of its models: what scaling reads. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from serving.load import Load


def summed(loads: Sequence[Load], cpus: float) -> Load:
    """One load for all models of a replica.

    The capacity is such that rows coming, divided by it, is the sum of what each model's rows take of the
    replica: the harmonic mean, weighted by rows. A model that was evicted has no load here: what it got
    in the last seconds isn't counted, which is little, as it was the least recently used.

    Args:
        loads: of the models that are loaded.
        cpus: of the replica; its models run side by side on them.
    """
    arriving = sum(load.arriving_rows_per_s for load in loads)
    shares = [
        load.arriving_rows_per_s / load.capacity_rows_per_s for load in loads if load.capacity_rows_per_s
    ]
    known = [load.capacity_rows_per_s for load in loads if load.capacity_rows_per_s]
    if taken := sum(shares):
        rows = sum(load.arriving_rows_per_s for load in loads if load.capacity_rows_per_s)
        capacity: float | None = rows / taken
    else:
        capacity = sum(known) / len(known) if known else None
    return Load(
        waiting_requests=sum(load.waiting_requests for load in loads),
        oldest_waiting_s=max((load.oldest_waiting_s for load in loads), default=0.0),
        busy_fraction=min(1.0, sum(load.busy_fraction for load in loads) / max(1.0, cpus)),
        capacity_rows_per_s=capacity,
        arrivals_per_s=sum(load.arrivals_per_s for load in loads),
        arriving_rows_per_s=arriving,
        lost_per_s=sum(load.lost_per_s for load in loads),
    )
