"""A trace replayed: requests come, wait, run in batches or are dropped; a policy starts and stops replicas.

A discrete-event simulation on a grid of whole ticks. What makes it fast enough for thousands of replicas:
requests of one tick are one cohort, replicas of one kind are counted (`serving.simulator.replicas`), and
a batch that begins on many of them at once is one event. What it simplifies:

- One queue for all replicas, where the real ones have one each behind an ingress that picks the least
  loaded. It is a little kinder, to every policy alike: a new replica helps with what already waits.
- Batches are first in, first out, as large as the waiting requests spread over the free slots allow (by
  capacity, where there are several kinds; the ingress weighs its servers so); a request that can't end in
  time is dropped when its turn comes. (The real planner weighs deadlines.)
- Requests that come while no replica is ready are held; their time runs anew once one is, as it does live,
  where a request's deadline is set by the replica. They count as violations if they are answered late.

Draws nothing but cold starts, from a seed: the same trace, policy and seed give the same result.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from serving.load import WINDOW_S
from serving.scaling.observed import Seen
from serving.simulator.replicas import Kind, Pool
from serving.simulator.traces import Times

TICK_S = 1.0
"""How often policies are asked."""
WAKE_S = 0.1
"""How long it takes until the first request at no replicas is noticed: Ray Serve's control loop."""
_PERCENTILES = (50, 99)


class Scaler(Protocol):
    """A policy, as the simulator asks it: replicas of each kind."""

    def __call__(self, seen: Sequence[Seen], targets: Sequence[int], now_s: float) -> Sequence[int]:
        """Replicas wanted of each kind, given what is seen of each and what was wanted before."""
        ...


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything but the trace and the policy. `bounds` are the least and most replicas of each kind."""

    kinds: tuple[Kind, ...]
    bounds: tuple[tuple[int, int], ...]
    slo_s: float
    seed: int = 0

    @property
    def grid_s(self) -> float:
        """A tick of the grid: a twentieth of the shortest batch, between 0.5 and 20 ms."""
        return min(max(min(kind.batch_s(1) for kind in self.kinds) / 20, 0.0005), 0.02)


@dataclass(frozen=True, slots=True)
class Result:
    """What a policy did to a trace."""

    requests: int
    violations: int
    """Requests answered later than the SLO, or never."""
    replica_s: tuple[float, ...]
    """Replica-seconds of each kind, from start to stop."""
    cost: float
    mean_replicas: float
    max_replicas: int
    latency_s: tuple[float, ...]
    """Percentiles 50 and 99 of those answered."""
    points: tuple[tuple[float, float, int, float], ...]
    """(second, requests a second, replicas, violations a second), one for each second."""

    @property
    def violation_share(self) -> float:
        """Violations by requests."""
        return self.violations / self.requests if self.requests else 0.0


@dataclass(slots=True)
class _Tally:
    """Counts since the policy was last asked."""

    arrived: int = 0
    lost: int = 0
    busy: float = 0.0
    in_flight: float = 0.0


class World:
    """One replay of a trace under a policy. Times inside are ticks of the setting's grid."""

    def __init__(self, setting: Setting, scaler: Scaler) -> None:
        grid_s = setting.grid_s
        self.setting = setting
        self._scaler = scaler
        self._slo = round(setting.slo_s / grid_s)
        self._tick = round(TICK_S / grid_s)
        self._draw = np.random.default_rng(setting.seed)
        self._batch = [
            [0, *(max(1, round(kind.batch_s(rows) / grid_s)) for rows in range(1, kind.max_batch + 1))]
            for kind in setting.kinds
        ]
        self._pools = [Pool(kind) for kind in setting.kinds]
        capacities_s = [kind.capacity_s(setting.slo_s) / kind.slots for kind in setting.kinds]
        self._by_speed = sorted(
            zip(self._pools, self._batch, capacities_s, strict=True), key=lambda one: one[1][1]
        )
        self._targets = [low for low, _ in setting.bounds]
        for pool, target in zip(self._pools, self._targets, strict=True):
            pool.ready = target
        self._queue: deque[list[int]] = deque()
        """Cohorts: [came, must end by, requests]."""
        self._waiting = 0
        self._held = False
        self._violations = 0
        self._tallies = deque([_Tally()], maxlen=round(WINDOW_S / TICK_S))
        self._answered: list[tuple[int, int]] = []
        """(ticks from coming to answer, requests)."""
        self._points: list[tuple[float, float, int, float]] = []
        self._replica_ticks = [0] * len(self._pools)
        self._most = 0

    def replay(self, times_s: Times) -> Result:
        """Run the trace, and a minute of quiet after it."""
        grid_s = self.setting.grid_s
        bins, counts = np.unique(np.floor(times_s / grid_s).astype(np.int64), return_counts=True)
        arrivals = list(zip(bins.tolist(), counts.tolist(), strict=True))
        end = (int(bins[-1]) if bins.size else 0) + round(60 / grid_s)
        index, now, ask, wake = 0, 0, self._tick, -1
        while now < end:
            upcoming = [ask, arrivals[index][0] if index < len(arrivals) else end]
            upcoming += [at for pool in self._pools if (at := pool.next_event) is not None]
            if wake >= 0:
                upcoming.append(wake)
            at = min(upcoming)
            self._pass(now, at)
            now = at
            for pool in self._pools:
                pool.advance(now)
            if index < len(arrivals) and arrivals[index][0] <= now:
                self._arrive(now, arrivals[index][1])
                index += 1
                if wake < 0 and not any(self._targets):
                    wake = now + round(WAKE_S / grid_s)
            if 0 <= wake <= now:
                wake = -1
                if not any(self._targets):
                    self._aim(now, [1, *self._targets[1:]])
            self._dispatch(now)
            if ask <= now:
                self._ask(now)
                ask += self._tick
        return self._result(int(times_s.size))

    def _pass(self, since: int, now: int) -> None:
        """Let time go by with nothing changing."""
        span, tally = now - since, self._tallies[-1]
        for index, pool in enumerate(self._pools):
            self._replica_ticks[index] += pool.replicas * span
            tally.in_flight += pool.running_rows * span
        tally.busy += sum(pool.busy_slots for pool in self._pools) * span
        tally.in_flight += self._waiting * span

    def _arrive(self, now: int, requests: int) -> None:
        self._queue.append([now, now + self._slo, requests])
        self._waiting += requests
        self._tallies[-1].arrived += requests
        if not any(pool.ready for pool in self._pools):
            self._held = True

    def _dispatch(self, now: int) -> None:
        """Give what waits to the free slots, those that answer soonest first."""
        if self._held and any(pool.ready for pool in self._pools):
            self._held = False
            for cohort in self._queue:
                cohort[1] = now + self._slo
        for pool, batch, slot_s in self._by_speed:
            while self._waiting and (free := pool.free_slots):
                all_s = sum(other.free_slots * s for other, _, s in self._by_speed)
                rows = min(pool.kind.max_batch, math.ceil(self._waiting * slot_s / all_s - 1e-9))
                while rows > 1 and batch[rows] > self._slo:
                    rows -= 1
                taken = self._take(now, now + batch[rows], min(self._waiting, rows * free))
                if taken == 0:
                    break
                pool.begin(now, now + batch[rows], min(free, -(-taken // rows)), taken)

    def _take(self, now: int, ends: int, wanted: int) -> int:
        """Take up to `wanted` requests that can end in time off the queue; drop those that can't."""
        taken = 0
        while self._queue and taken < wanted:
            cohort = self._queue[0]
            came, by, requests = cohort
            if by < ends:
                self._queue.popleft()
                self._waiting -= requests
                self._lose(requests)
                continue
            some = min(requests, wanted - taken)
            taken += some
            self._waiting -= some
            self._answered.append((ends - came, some))
            if ends - came > self._slo:
                self._lose(some)
            if some == requests:
                self._queue.popleft()
            else:
                cohort[2] -= some
        return taken

    def _lose(self, requests: int) -> None:
        self._violations += requests
        self._tallies[-1].lost += requests

    def _ask(self, now: int) -> None:
        now_s = now * self.setting.grid_s
        seen = self._seen(now)
        replicas = sum(pool.replicas for pool in self._pools)
        self._most = max(self._most, replicas)
        tally = self._tallies[-1]
        self._points.append((now_s, tally.arrived / TICK_S, replicas, tally.lost / TICK_S))
        self._aim(now, self._scaler(seen, self._targets, now_s))
        self._tallies.append(_Tally())

    def _seen(self, now: int) -> list[Seen]:
        """What is seen of each kind. The queue is of all kinds: the load is told of the first only."""
        span_s = len(self._tallies) * TICK_S
        arriving = sum(tally.arrived for tally in self._tallies) / span_s
        lost = sum(tally.lost for tally in self._tallies) / span_s
        busy = sum(tally.busy for tally in self._tallies) / (len(self._tallies) * self._tick)
        oldest_s = (now - self._queue[0][0]) * self.setting.grid_s if self._queue else 0.0
        slots = sum(pool.ready * pool.kind.slots for pool in self._pools)
        seen = []
        for index, pool in enumerate(self._pools):
            of_all = 1 if index == 0 else 0
            seen.append(
                Seen(
                    ready=pool.ready,
                    starting=len(pool.starting),
                    arriving_rows_s=arriving * of_all,
                    lost_rows_s=lost * of_all,
                    waiting_rows=self._waiting * of_all,
                    oldest_waiting_s=oldest_s,
                    busy_fraction=min(1.0, busy / max(slots, 1)),
                    capacity_rows_s=pool.kind.capacity_s(self.setting.slo_s),
                    in_flight=self._tallies[-1].in_flight / self._tick * of_all,
                )
            )
        return seen

    def _aim(self, now: int, wanted: Sequence[int]) -> None:
        bounds = self.setting.bounds
        self._targets = [min(max(n, low), high) for n, (low, high) in zip(wanted, bounds, strict=True)]
        for pool, target in zip(self._pools, self._targets, strict=True):
            have = pool.ready + len(pool.starting)
            for _ in range(target - have):
                pool.start(now + self._cold_start(pool.kind))
            if target < have:
                pool.stop(have - target)

    def _cold_start(self, kind: Kind) -> int:
        """A cold start's length, drawn; its mean is the kind's."""
        deviation = kind.spread * float(self._draw.standard_normal()) - kind.spread**2 / 2
        return max(1, round(kind.cold_start_s * math.exp(deviation) / self.setting.grid_s))

    def _result(self, requests: int) -> Result:
        self._violations += self._waiting  # never answered
        replica_s = tuple(ticks * self.setting.grid_s for ticks in self._replica_ticks)
        duration_s = max(len(self._points) * TICK_S, TICK_S)
        return Result(
            requests=requests,
            violations=self._violations,
            replica_s=replica_s,
            cost=sum(s / 3600 * k.cost_per_hour for s, k in zip(replica_s, self.setting.kinds, strict=True)),
            mean_replicas=sum(replica_s) / duration_s,
            max_replicas=self._most,
            latency_s=_percentiles(self._answered, self.setting.grid_s),
            points=tuple(self._points),
        )


def _percentiles(answered: Sequence[tuple[int, int]], grid_s: float) -> tuple[float, ...]:
    if not answered:
        return (float("nan"),) * len(_PERCENTILES)
    ticks, counts = np.array(answered).T
    order = np.argsort(ticks)
    share = np.cumsum(counts[order]) / counts.sum()
    return tuple(float(ticks[order][np.searchsorted(share, p / 100)]) * grid_s for p in _PERCENTILES)
