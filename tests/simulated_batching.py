"""A device, requests and batching rules in simulated time: which rule answers how many in time.

The device is that of the class test, 50 ms and 1 ms for each row, with some noise. Requests come open-loop.
The rules beside ours are those of other servers, written from their descriptions.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from serving.batching.door import Door
from serving.batching.latency import LatencyModel
from serving.batching.planner import Planner
from serving.batching.ticket import NORMAL, Ticket
from serving.load import LoadWindow

MAX_ROWS = 32


@dataclass(slots=True, eq=False)
class Arrival:
    """One request, of one row."""

    at_s: float
    within_s: float
    length: int = 0
    level: int = NORMAL
    answered_s: float = math.inf
    executed: bool = False
    refused: bool = False

    @property
    def deadline_s(self) -> float:
        return self.at_s + self.within_s

    @property
    def in_time(self) -> bool:
        return self.answered_s <= self.deadline_s


class Rule(Protocol):
    """Says what runs next."""

    def arrive(self, request: Arrival, now_s: float) -> None:
        """A request came."""

    def look(self, now_s: float, *, free: bool) -> list[Arrival] | float | None:
        """A batch for a free device, or when to look again; None for "when something happens"."""

    def ran(self, batch: list[Arrival], started_s: float, now_s: float) -> None:
        """A batch is done."""


@dataclass
class Device:
    """Takes `batch_s`, `row_s` for each row, and `element_s` for each padded element."""

    batch_s: float = 0.050
    row_s: float = 0.001
    element_s: float = 0.0
    noise: float = 0.02
    rng: random.Random = field(default_factory=lambda: random.Random(7))
    slower: Callable[[float], float] = lambda now_s: 1.0

    def duration_s(self, batch: list[Arrival], now_s: float) -> float:
        length = max(request.length for request in batch)
        exact_s = self.batch_s + len(batch) * (self.row_s + self.element_s * length)
        return exact_s * self.slower(now_s) * self.rng.uniform(1 - self.noise, 1 + self.noise)


@dataclass
class Outcome:
    """What a rule made of the arrivals."""

    arrivals: list[Arrival]
    batches: list[list[Arrival]]
    seconds: float

    @property
    def goodput(self) -> float:
        """Requests a second answered in time."""
        return sum(request.in_time for request in self.arrivals) / self.seconds

    @property
    def late_share(self) -> float:
        """Of the requests that were executed, those answered late."""
        executed = [request for request in self.arrivals if request.executed]
        return sum(not request.in_time for request in executed) / max(len(executed), 1)

    @property
    def waste(self) -> float:
        """The share of all elements that was padding."""
        whole = sum(len(batch) * max(r.length for r in batch) for batch in self.batches)
        return 1 - sum(request.length for batch in self.batches for request in batch) / whole


def simulate(rule: Rule, arrivals: Iterable[Arrival], device: Device | None = None) -> Outcome:
    """Run all arrivals to their end."""
    device = device or Device()
    waiting = deque(sorted(arrivals, key=lambda request: request.at_s))
    everyone = list(waiting)
    batches: list[list[Arrival]] = []
    running: list[Arrival] | None = None
    started_s = ends_s = now_s = 0.0
    look_s = math.inf
    while waiting or running is not None or look_s < math.inf:
        next_s = waiting[0].at_s if waiting else math.inf
        now_s = min(next_s, ends_s if running is not None else math.inf, look_s)
        if running is not None and ends_s <= now_s:
            for request in running:
                request.answered_s = now_s
            rule.ran(running, started_s, now_s)
            running = None
        while waiting and waiting[0].at_s <= now_s:
            rule.arrive(waiting.popleft(), now_s)
        found = rule.look(now_s, free=running is None)
        look_s = found if isinstance(found, float) else math.inf
        if isinstance(found, list):
            assert running is None
            assert found
            for request in found:
                assert not request.executed
                request.executed = True
            batches.append(found)
            running, started_s = found, now_s
            ends_s = now_s + device.duration_s(found, now_s)
            look_s = now_s
    return Outcome(everyone, batches, everyone[-1].at_s - everyone[0].at_s)


class ServeBatch:
    """Ray Serve's: a batch closes when full or some time after its first request, free device or not."""

    def __init__(self, wait_s: float = 0.010) -> None:
        self._wait_s = wait_s
        self._open: list[Arrival] = []
        self._closes_s = math.inf
        self._closed: deque[list[Arrival]] = deque()

    def arrive(self, request: Arrival, now_s: float) -> None:
        self._close(now_s)
        if not self._open:
            self._closes_s = now_s + self._wait_s
        self._open.append(request)
        if len(self._open) == MAX_ROWS:
            self._closes_s = now_s

    def look(self, now_s: float, *, free: bool) -> list[Arrival] | float | None:
        self._close(now_s)
        if free and self._closed:
            return self._closed.popleft()
        return self._closes_s if self._open else None

    def ran(self, batch: list[Arrival], started_s: float, now_s: float) -> None:
        pass

    def _close(self, now_s: float) -> None:
        if self._open and now_s >= self._closes_s:
            self._closed.append(self._open)
            self._open, self._closes_s = [], math.inf


class OnDemand:
    """First in, first out, cut when the device is free; what has expired is dropped."""

    def __init__(self) -> None:
        self._queue: deque[Arrival] = deque()

    def arrive(self, request: Arrival, now_s: float) -> None:
        self._queue.append(request)

    def look(self, now_s: float, *, free: bool) -> list[Arrival] | float | None:
        batch: list[Arrival] = []
        while free and self._queue and len(batch) < MAX_ROWS:
            request = self._queue.popleft()
            if request.deadline_s >= now_s:
                batch.append(request)
        return batch or None

    def ran(self, batch: list[Arrival], started_s: float, now_s: float) -> None:
        pass


class Bento:
    """BentoML's: latency fitted as a line through the last batches, and one limit for all requests.

    Once a millisecond it looks at its queue. If the whole queue, run as one batch now, would make the first
    request late, the first is given up. If the device is free, it waits a little for more as long as the
    waiting so far is short of what batches used to wait, then runs up to the maximum.
    """

    TICK_S = 0.001
    KEPT = 50
    FIT_EVERY_S = 5.0

    def __init__(self, max_latency_s: float) -> None:
        self._limit_s = max_latency_s
        self._row_s, self._batch_s = max_latency_s / 15, max_latency_s / 30
        self._usual_wait_s = 0.0
        self._queue: deque[Arrival] = deque()
        self._seen: deque[tuple[int, float, float]] = deque(maxlen=self.KEPT)
        self._fitted_s = -math.inf

    def arrive(self, request: Arrival, now_s: float) -> None:
        self._queue.append(request)

    def look(self, now_s: float, *, free: bool) -> list[Arrival] | float | None:
        while self._queue:
            count = len(self._queue)
            waited_s = now_s - self._queue[0].at_s
            if count > 1 and waited_s + self._row_s * count + self._batch_s >= self._limit_s:
                self._queue.popleft().refused = True
                continue
            if not free:
                if count == 1 and waited_s >= self._limit_s:
                    self._queue.popleft().refused = True
                    continue
                return now_s + self.TICK_S
            newest_s = now_s - self._queue[-1].at_s
            if (
                count < MAX_ROWS
                and count * (newest_s + self.TICK_S + self._row_s) <= self._usual_wait_s * 0.95
            ):
                return now_s + self.TICK_S
            return [self._queue.popleft() for _ in range(min(count, MAX_ROWS))]
        return None

    def ran(self, batch: list[Arrival], started_s: float, now_s: float) -> None:
        self._seen.append((len(batch), now_s - started_s, started_s - batch[0].at_s))
        if len(self._seen) < 12 or now_s - self._fitted_s >= self.FIT_EVERY_S:
            self._fitted_s = now_s
            count = len(self._seen)
            rows = sum(n for n, _, _ in self._seen) / count
            took_s = sum(t for _, t, _ in self._seen) / count
            spread = sum((n - rows) ** 2 for n, _, _ in self._seen)
            slope_s = sum((n - rows) * (t - took_s) for n, t, _ in self._seen) / spread if spread else 0.0
            self._row_s = max(1e-6, slope_s)
            self._batch_s = max(0.0, took_s - slope_s * rows)
            self._usual_wait_s = max(0.0, sum(w for _, _, w in self._seen) / count)


class Ours:
    """The door and the planner, with latency learned as batches run."""

    def __init__(self, slo_s: float, latency: LatencyModel | None = None, way_back_s: float = 0.0) -> None:
        self.latency = latency or LatencyModel()
        self.planner = Planner(max_batch_rows=MAX_ROWS, slo_s=slo_s)
        self.door = Door(max_batch_rows=MAX_ROWS, max_queue_rows=100_000, slo_s=slo_s)
        self.window = LoadWindow(0.0)
        self.dropped: list[Arrival] = []
        self._way_back_s = way_back_s
        self._ends_s: float | None = None

    def arrive(self, request: Arrival, now_s: float) -> None:
        octave = math.ceil(5 * math.log2(request.length)) if request.length else None
        ticket = Ticket(
            1,
            request.deadline_s - self._way_back_s,
            self,
            request.length,
            None,
            octave,
            request.level,
            now_s,
            request,
        )
        free_s = now_s if self._ends_s is None else max(now_s, self._ends_s)
        idle = self._ends_s is None and not len(self.planner)
        self.window.arrived(now_s, 1)
        refusal = self.door.refusal(
            ticket,
            self.planner.backlog,
            now_s=now_s,
            free_s=free_s,
            idle=idle,
            coming_rows_per_s=self.window.rates(now_s)[1],
        )
        if refusal is None:
            self.planner.add(ticket)
        else:
            request.refused = True

    def look(self, now_s: float, *, free: bool) -> list[Arrival] | float | None:
        if not free:
            return None
        plan = self.planner.cut(now_s)
        self.dropped += [ticket.payload for ticket in plan.dropped]
        if not plan.batch:
            return None
        self._ends_s = now_s + self.latency.estimate_s(plan.rows, plan.length)
        return [part.ticket.payload for part in plan.batch]

    def ran(self, batch: list[Arrival], started_s: float, now_s: float) -> None:
        self._ends_s = None
        self.latency.observe(len(batch), max(request.length for request in batch), now_s - started_s)


def poisson(
    rate: float, seconds: float, within_s: Callable[[random.Random], float], seed: int = 1
) -> list[Arrival]:
    """Requests at random times."""
    rng, now_s, found = random.Random(seed), 0.0, []
    while (now_s := now_s + rng.expovariate(rate)) < seconds:
        found.append(Arrival(now_s, within_s(rng)))
    return found


def bursty(rate: float, seconds: float, within_s: float, seed: int = 1) -> list[Arrival]:
    """Requests in bunches of 1 to 40 that come within a few milliseconds."""
    rng, now_s, found = random.Random(seed), 0.0, []
    while now_s < seconds:
        size = rng.randint(1, 40)
        found += [Arrival(now_s + rng.uniform(0, 0.003), within_s) for _ in range(size)]
        now_s += rng.expovariate(rate / 20.5)
    return found


def merged(*streams: Iterable[Arrival]) -> list[Arrival]:
    """Several streams as one."""
    return list(heapq.merge(*streams, key=lambda request: request.at_s))
