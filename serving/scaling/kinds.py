"""How many replicas of each of two kinds, such as on CPUs and on GPUs. Pure, beside `serving.scaling.policy`.

    rows a second     what `policy` would provide for, one cold start of the kind from now
    base              the mix that, had it stayed through the last minutes with the cheapest on top of it
                      whenever that was too little, would have cost least; a new one is to be cheaper by 5%
    mix               the cheapest on top of the base that does the rows
    bridge            while the kind that starts slowly starts, the other does its share, so far as it can
    wanted            of each kind: more at once, less only when it has been less for a while

A mix is cheapest by whole replicas: a kind that costs less a row when it is full may cost more for a small
load. So where CPUs are cheaper for what is always there they do that, and GPUs come for a peak that is large
enough for them and go after it; at prices for which it is the other way around, it is the other way around.
From none at all, it is the kind that starts fastest, if one of it is enough.

A kind whose capacity isn't known yet is taken to be worth its price, so that it is tried where the load is
worth that much. Knows nothing of Ray. Whatever it is shown, it answers within the bounds and doesn't raise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.scaling import policy
from serving.scaling.observed import Seen
from serving.scaling.policy import Settings
from serving.scaling.starts import Starts

CHEAPER = 0.95
"""A new base costs at most so much of what the old one would."""
_QUANTILES = (0.0, 0.2, 0.5, 0.8, 1.0)
"""Of the last minutes' load: what bases are tried for."""
_LEAST_PRICE = 1e-6
_LEAST_CAPACITY_S = 1e-6


class Terms(NamedTuple):
    """What the service says of one kind."""

    least: int
    most: int
    cost_per_hour: float
    """Of one replica."""


@dataclass(frozen=True, slots=True)
class KindState:
    """What is remembered of one kind."""

    capacity_s: float | None = None
    """Rows a second of one replica; None: never seen."""
    wanted: tuple[tuple[float, int], ...] = ()
    starts: Starts = field(default_factory=Starts)


@dataclass(frozen=True, slots=True)
class State:
    """What is remembered between decisions: of the whole load, and of each kind."""

    whole: policy.State = field(default_factory=policy.State)
    kinds: tuple[KindState, ...] = (KindState(), KindState())
    base: tuple[int, int] = (0, 0)


class Decision(NamedTuple):
    """Replicas of each kind, and what to remember."""

    wanted: tuple[int, ...]
    state: State


def decide(
    settings: Settings,
    terms: Sequence[Terms],
    state: State,
    seen: Sequence[Seen],
    targets: Sequence[int],
    now_s: float,
) -> Decision:
    """Decide once, for two kinds.

    Args:
        settings: `least` and `most` are those of `terms`, whatever stands in them.
        seen: of each kind. Their rows, waiting and lost are added up.
        targets: replicas of each kind that were wanted until now.
        now_s: on any clock that doesn't go back; if it does, the history starts anew.
    """
    sane = [one.sane() for one in seen]
    if not math.isfinite(now_s):
        return Decision(tuple(_bounded(t, n) for t, n in zip(terms, targets, strict=True)), state)
    kinds = tuple(
        replace(kind, capacity_s=one.capacity_rows_s or kind.capacity_s)
        for kind, one in zip(state.kinds, sane, strict=True)
    )
    capacities = _capacities(terms, kinds)
    whole_seen = _together(sane, capacities)
    whole = policy.remember(settings, state.whole, whole_seen, sum(targets), now_s)
    idle = policy.idle(settings, whole, now_s)
    load = _Load(settings, terms, kinds, whole, whole_seen, capacities)
    base = (terms[0].least, terms[1].least) if idle else load.base(state.base)
    mix = base if idle else load.mix(base)
    kept, wanted = [], []
    for kind, count in zip(kinds, mix, strict=True):
        hold_s = max(settings.hold_least_s, settings.hold_cold_starts * kind.starts.cold_start_s)
        remembered, held = policy.hold(() if idle else kind.wanted, count, now_s, hold_s)
        kept.append(remembered)
        wanted.append(held)
    if not idle:
        load.bridge(wanted, [one.ready for one in sane], targets)
    wanted = [_bounded(term, n) for term, n in zip(terms, wanted, strict=True)]
    new = tuple(
        replace(k, wanted=w, starts=k.starts.after(ready=one.ready, target=n, now_s=now_s))
        for k, w, one, n in zip(kinds, kept, sane, wanted, strict=True)
    )
    return Decision(tuple(wanted), State(whole, new, base))


def cheapest(
    rows_s: float, terms: Sequence[Terms], capacities: Sequence[float], floor: Sequence[int]
) -> tuple[int, int]:
    """The cheapest numbers of two kinds, at least `floor`, that do `rows_s` together; all where none do.

    Of equally cheap ones, that with the fewest replicas.
    """
    (low, most), (other_low, other_most) = ((n, t.most) for n, t in zip(floor, terms, strict=True))
    useful = max(other_low, min(other_most, math.ceil(min(rows_s / capacities[1], 1e9))))
    others = np.arange(other_low, useful + 1, dtype=np.float64)
    ones = np.ceil((rows_s - others * capacities[1]) / capacities[0] - 1e-9)
    ones = np.maximum(ones, low)
    enough = ones <= max(low, most)
    if not enough.any():
        return max(low, most), max(other_low, other_most)
    cost = ones * _price(terms[0]) + others * _price(terms[1])
    # Sums of prices differ in their last digits; a millionth of a replica's price breaks ties.
    cost = np.where(enough, cost + 1e-6 * min(map(_price, terms)) * (ones + others), np.inf)
    best = int(np.argmin(cost))
    return int(ones[best]), int(others[best])


class _Load(NamedTuple):
    """What there is to do, and what there is to do it with."""

    settings: Settings
    terms: Sequence[Terms]
    kinds: Sequence[KindState]
    whole: policy.State
    seen: Seen
    capacities: tuple[float, float]

    @property
    def fast(self) -> int:
        """The kind that starts faster."""
        one, other = (kind.starts.cold_start_s for kind in self.kinds)
        return 0 if one <= other else 1

    def rows_s(self, kind: int) -> float:
        """Rows a second to provide for, one cold start of a kind from now; above 0."""
        horizon_s = self.kinds[kind].starts.cold_start_s
        rows_s = policy.rows_needed(self.settings, self.whole, self.seen, horizon_s)
        return max(rows_s, math.ulp(1.0))

    def base(self, before: tuple[int, int]) -> tuple[int, int]:
        """The mix that is to stay, given the one that stays now."""
        peaks_s = self._peaks_s()
        floor = [term.least for term in self.terms]
        tried = {self._cheapest(float(rows_s), floor) for rows_s in np.quantile(peaks_s, _QUANTILES)}
        for kind in range(2):  # and one kind alone, which may be what was cheaper all along
            rows = math.ceil(float(peaks_s.min()) / self.capacities[kind] - 1e-9)
            alone = list(floor)
            alone[kind] = min(max(rows, floor[kind]), self.terms[kind].most)
            tried.add((alone[0], alone[1]))
        best = min(sorted(tried), key=lambda base: self._mean_cost(base, peaks_s))
        kept = self._mean_cost(before, peaks_s)
        return best if self._mean_cost(best, peaks_s) <= CHEAPER * kept else before

    def mix(self, base: tuple[int, int]) -> tuple[int, int]:
        """Replicas of each kind for the load that is forecast, before stabilisation."""
        fast, slow = self.fast, 1 - self.fast
        soon_s, floor = self.rows_s(fast), [term.least for term in self.terms]
        if self.seen.ready == 0 and soon_s <= self.capacities[fast] and self.terms[fast].most > 0:
            floor[fast] = max(1, floor[fast])
            return floor[0], floor[1]
        counts = list(self._cheapest(soon_s, base))
        # What comes later can still be met by fast replicas, asked for later; so far as there may be enough.
        beyond_s = self.rows_s(slow) - self.terms[fast].most * self.capacities[fast]
        counts[slow] = max(
            counts[slow], math.ceil(min(beyond_s / self.capacities[slow], self.terms[slow].most))
        )
        return counts[0], counts[1]

    def bridge(self, wanted: list[int], ready: Sequence[int], targets: Sequence[int]) -> None:
        """While slow replicas start, want enough fast ones to do without them."""
        fast, slow = self.fast, 1 - self.fast
        if wanted[slow] > ready[slow]:
            rest = (self.rows_s(fast) - ready[slow] * self.capacities[slow]) / self.capacities[fast]
            missing = math.ceil(min(rest, self.terms[fast].most))
            wanted[fast] = max(wanted[fast], missing, min(targets[fast], ready[fast]) if missing > 0 else 0)

    def _peaks_s(self) -> NDArray[np.float64]:
        """Rows a second that the last minutes needed: the most of each time for which a replica is held."""
        step = max(1, int(self.settings.hold_least_s))
        rates = np.asarray(self.whole.rates)
        first = rates.size % step if rates.size > step else 0
        most = np.maximum.reduceat(rates[first:], np.arange(0, rates.size - first, step))
        needed: NDArray[np.float64] = most + self.settings.chance * np.sqrt(most / self.settings.slo_s)
        return np.maximum(needed / self.whole.share, math.ulp(1.0))

    def _cheapest(self, rows_s: float, floor: Sequence[int]) -> tuple[int, int]:
        return cheapest(rows_s, self.terms, self.capacities, floor)

    def _mean_cost(self, base: tuple[int, int], peaks_s: NDArray[np.float64]) -> float:
        """Of a base, with the cheapest on top of it for each of the peaks, which stays for the next one."""
        mixes = [self._cheapest(float(rows_s), base) for rows_s in peaks_s]
        before = [mixes[0], *mixes[:-1]]
        held = [(max(a[0], b[0]), max(a[1], b[1])) for a, b in zip(mixes, before, strict=True)]
        return sum(map(self._cost, held)) / len(held)

    def _cost(self, counts: Sequence[int]) -> float:
        return sum(n * _price(term) for n, term in zip(counts, self.terms, strict=True))


def _capacities(terms: Sequence[Terms], kinds: Sequence[KindState]) -> tuple[float, float]:
    """Rows a second of a replica of each kind; unknown ones by their price."""
    per_price = [k.capacity_s / _price(t) for k, t in zip(kinds, terms, strict=True) if k.capacity_s]
    known = per_price[0] if per_price else policy.CAPACITY_S / min(map(_price, terms))
    one, other = (k.capacity_s or known * _price(t) for k, t in zip(kinds, terms, strict=True))
    return max(one, _LEAST_CAPACITY_S), max(other, _LEAST_CAPACITY_S)


def _together(seen: Sequence[Seen], capacities: Sequence[float]) -> Seen:
    """All kinds as one, whose capacity is the mean over the replicas that are ready."""
    ready = sum(one.ready for one in seen)
    full_s = sum(one.ready * capacity for one, capacity in zip(seen, capacities, strict=True))
    return Seen(
        ready=ready,
        starting=sum(one.starting for one in seen),
        arriving_rows_s=sum(one.arriving_rows_s for one in seen),
        lost_rows_s=sum(one.lost_rows_s for one in seen),
        waiting_rows=sum(one.waiting_rows for one in seen),
        oldest_waiting_s=max(one.oldest_waiting_s for one in seen),
        capacity_rows_s=full_s / ready if ready else None,
        in_flight=sum(one.in_flight for one in seen),
    )


def _price(terms: Terms) -> float:
    return max(terms.cost_per_hour, _LEAST_PRICE)


def _bounded(terms: Terms, replicas: int) -> int:
    return min(max(replicas, terms.least), terms.most)
