"""What is seen of a trial: counts of both versions that can be added up over replicas.

Batches of a candidate are smaller than those of the version in service, which gets most of the requests, so
their times can't be compared as they are. Each is divided by what the version in service usually takes for a
batch of that size. The quotients go into a histogram whose buckets grow by a tenth, so a quantile is known
to within 10% and replicas' histograms add. Scores keep count, sum and sum of squares. Pure, and small: some
kilobytes of JSON.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Self

from pydantic import BaseModel, ConfigDict, Field

_FIRST = 1e-4
_GROWTH = 1.1
_LAST_BUCKET = 170


class Scores(BaseModel):
    """Numbers that came back for answers, such as 1 for right and 0 for wrong."""

    model_config = ConfigDict(extra="ignore")

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, score: float) -> None:
        """Count one."""
        self.count += 1
        self.total += score
        self.squares += score * score

    @property
    def mean(self) -> float:
        """Their mean; 0 where there are none."""
        return self.total / self.count if self.count else 0.0

    @property
    def variance_of_mean(self) -> float:
        """How uncertain the mean is; infinite below two."""
        if self.count < 2:
            return math.inf
        spread = max(0.0, self.squares - self.count * self.mean**2) / (self.count - 1)
        return spread / self.count


class Side(BaseModel):
    """One version's requests."""

    model_config = ConfigDict(extra="ignore")

    requests: int = 0
    failed: int = 0
    """Those that the version could not answer: it raised, or refused what the other takes."""
    times: Counter[int] = Field(default_factory=Counter)
    """Batches by bucket: how many times what the version in service usually takes they took."""
    scores: Scores = Field(default_factory=Scores)

    def answered(self) -> None:
        """The version answered a request."""
        self.requests += 1

    def took(self, times: float) -> None:
        """A batch took so many times what the version in service usually takes for one of its size."""
        self.times[_bucket(times)] += 1

    def broke(self) -> None:
        """The version could not answer a request."""
        self.requests += 1
        self.failed += 1

    def quantile(self, share: float) -> float:
        """What `share` of its batches kept to, as the upper edge of a bucket; 0 without any."""
        wanted = share * self.times.total()
        seen = 0
        for bucket in sorted(self.times):
            seen += self.times[bucket]
            if seen >= wanted:
                return _upper(bucket)
        return 0.0

    def slower_than(self, limit: float) -> int:
        """Batches that surely took longer than `limit` times as long."""
        first = _bucket(limit) + 1
        return sum(count for bucket, count in self.times.items() if bucket >= first)

    def plus(self, other: Side) -> Side:
        """Both together."""
        scores = Scores(
            count=self.scores.count + other.scores.count,
            total=self.scores.total + other.scores.total,
            squares=self.scores.squares + other.scores.squares,
        )
        return Side(
            requests=self.requests + other.requests,
            failed=self.failed + other.failed,
            times=self.times + other.times,
            scores=scores,
        )


class Evidence(BaseModel):
    """What one replica, or all together, saw in one step of a trial."""

    model_config = ConfigDict(extra="ignore")

    stable: Side = Field(default_factory=Side)
    candidate: Side = Field(default_factory=Side)
    compared: int = 0
    """Rows that a shadow answered too."""
    differed: int = 0
    """Those of them that it answered otherwise."""
    broken: str | None = None
    """Why a replica could not load the candidate, where that is so."""

    def plus(self, other: Evidence) -> Self:
        """Both together."""
        return type(self)(
            stable=self.stable.plus(other.stable),
            candidate=self.candidate.plus(other.candidate),
            compared=self.compared + other.compared,
            differed=self.differed + other.differed,
            broken=self.broken or other.broken,
        )


def _bucket(times: float) -> int:
    if times <= _FIRST:
        return 0
    return min(_LAST_BUCKET, math.ceil(math.log(times / _FIRST, _GROWTH)))


def _upper(bucket: int) -> float:
    return _FIRST * _GROWTH**bucket
