"""How many pods of which size hold a number of equal workers or replicas. Arithmetic only.

A pod is made to fit: what runs in it fills it, so that Ray's count of free resources and the
scheduler's agree, and the largest number of replicas is reached with the largest number of pods.
The pod's limits are the only place where resources stand: the operator derives Ray's figures from
them, and refuses a group that says them twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from cluster.errors import BadInput

_EPSILON = 1e-9
_LEAST_SHARE = 0.01


class Demand(NamedTuple):
    """Between `low` and `high` equal workers or replicas, each taking `cpus` and `gpus`."""

    cpus: float
    gpus: float
    low: int
    high: int


class Group(NamedTuple):
    """Pods of one size. `low` and `high` bound their number."""

    cpus: int
    gpus: int
    low: int
    high: int

    @property
    def name(self) -> str:
        """Says the size, so that equal sizes share a group whoever asks for them."""
        return f"cpu{self.cpus}" + (f"-gpu{self.gpus}" if self.gpus else "")


def worker_groups(demands: Iterable[Demand], whose: str) -> list[Group]:
    """The groups that hold all `demands` at once, in order of their size.

    Demands of one size share a group: a model more or less then changes only the bounds of a
    group, for which the operator builds no new cluster.

    Raises:
        BadInput: a demand that no pod can meet; `whose` names the field that asks for it.
    """
    found: dict[tuple[int, int], Group] = {}
    by_shape: dict[tuple[float, float], tuple[int, int]] = {}
    for demand in demands:
        low, high = by_shape.get((demand.cpus, demand.gpus), (0, 0))
        by_shape[demand.cpus, demand.gpus] = (low + demand.low, high + demand.high)
    for (cpus, gpus), (low, high) in by_shape.items():
        per_pod = _per_pod(cpus, gpus, whose)
        size = (max(1, math.ceil(per_pod * cpus - _EPSILON)), math.ceil(gpus - _EPSILON))
        before = found.get(size, Group(*size, 0, 0))
        found[size] = before._replace(
            low=before.low + math.ceil(low / per_pod), high=before.high + math.ceil(high / per_pod)
        )
    return sorted(found.values())


def _per_pod(cpus: float, gpus: float, whose: str) -> int:
    """How many of them share a pod: more than one only where one takes less than a whole GPU or CPU."""
    if gpus > 1 and not gpus.is_integer():
        raise BadInput(
            f"'{whose}.gpus' can't be scheduled", got=f"{gpus}", allowed="a whole number, or less than 1"
        )
    if gpus == 0 and cpus == 0:
        raise BadInput(
            f"'{whose}.cpus' can't be scheduled on Kubernetes",
            got="0, without GPUs",
            allowed="more than 0",
            fix="say what one takes: what takes nothing would pile up on the head and never scale",
        )
    share = gpus or cpus
    if share < _LEAST_SHARE:
        raise BadInput(
            f"'{whose}.{'gpus' if gpus else 'cpus'}' can't be scheduled",
            got=f"{share}",
            allowed=f"at least {_LEAST_SHARE}" + (", or 0" if gpus else ""),
        )
    return math.floor(1 / share + _EPSILON) if share < 1 else 1
