"""Counts kept in plain memory until they are handed on: adding takes well below a microsecond."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator

Labels = tuple[str, ...]
"""Values of a metric's labels, in the order of its table."""


class Distribution:
    """Values by bucket, with their exact sum.

    Args:
        bounds: upper edges of the buckets, ascending; above the last comes one more.
    """

    __slots__ = ("_bounds", "buckets", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self.buckets = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one value."""
        self.buckets[bisect_left(self._bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """How many values."""
        return sum(self.buckets)

    def cumulative(self) -> Iterator[tuple[str, int]]:
        """`le` as Prometheus writes it, and how many values are at most that."""
        below = 0
        for bound, here in zip((*self._bounds, float("inf")), self.buckets, strict=True):
            below += here
            yield ("+Inf" if bound == float("inf") else f"{bound:g}"), below


class Tally:
    """Counters and distributions, by metric and labels, since the last `take`."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, Labels]] = Counter()
        self.distributions: dict[tuple[str, Labels], Distribution] = {}

    def distribution(self, name: str, labels: Labels, bounds: tuple[float, ...]) -> Distribution:
        """The one of this metric and these labels, made if need be."""
        found = self.distributions.get((name, labels))
        if found is None:
            found = self.distributions[(name, labels)] = Distribution(bounds)
        return found
