"""Which requests run together next: the batch that keeps most deadlines, cut when a slot is free.

- The most urgent request of the level whose turn it is leads the batch; others of its lane join in order,
  as long as the tightest deadline among them is kept by the batch's latency.
- A batch takes at most half the SLO where it can, so that whoever just missed one is met by the next.
- A request that can't be met any more is dropped at once (*early drop*). So is one whose deadline allows
  only a small batch, but only where that would cost others theirs: when all that waits can't be met, a
  small batch is worth its rows less what a full one would have done in its time.
- Requests that are padded share a batch with those of about their length, so that what is padded stays
  below `MAX_WASTE`; a batch that isn't full looks for more in the neighbouring classes of length.
- A request larger than a batch is cut in order, and its remainder shares a batch with others.
- What was dropped or cancelled never runs.

A planner: its state is the queue, its inputs are tickets and `now_s`. It knows nothing of tensors, threads,
event loops or HTTP, so tests and simulations drive it with a clock of their own.
"""

from __future__ import annotations

from collections.abc import Iterator

from serving.batching.backlog import Backlog, Pace
from serving.batching.queue import Lane, Queue
from serving.batching.ticket import WEIGHTS, Part, Plan, Ticket

MAX_WASTE = 0.15
"""The share of a batch's elements that may be padding."""
_NEIGHBOURS = (-1, 1, -2, 2, -3, 3)
_PASS_OVER = 64
"""Requests that don't fit and are passed over, before a batch is taken as it is."""


class Planner:
    """The queue of one slot, or of several that run the same models.

    Args:
        max_batch_rows: rows run at once.
        slo_s: the longest time that requests usually have.
        slots: batches run at the same time.
    """

    def __init__(self, *, max_batch_rows: int, slo_s: float, slots: int = 1) -> None:
        self.max_batch_rows = max_batch_rows
        self.slo_s = slo_s
        self.slots = slots
        self._queue = Queue(slo_s)

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def backlog(self) -> Backlog:
        """What waits, by deadline."""
        return self._queue.backlog

    @property
    def waiting_rows(self) -> int:
        """Rows that wait."""
        return self._queue.backlog.rows

    def add(self, ticket: Ticket) -> None:
        """Take in a request; whether to is the door's affair."""
        self._queue.add(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Give up a request: what of it waits never runs."""
        self._queue.remove(ticket)

    def oldest_s(self, now_s: float) -> float:
        """How long the request that has waited longest has; 0 where nothing waits."""
        arrived_s = self._queue.oldest_arrival_s()
        return 0.0 if arrived_s is None else now_s - arrived_s

    def expire(self, now_s: float) -> list[Ticket]:
        """Drop every request whose deadline is before `now_s`."""
        expired: list[Ticket] = []
        for level in WEIGHTS:
            while (found := self._queue.earliest(level)) is not None and found[0].deadline_s < now_s:
                self._queue.remove(found[0])
                expired.append(found[0])
        return expired

    def cut(self, now_s: float) -> Plan:
        """The next batch, to be run at once. Call it with a free slot in hand."""
        plan = Plan()
        while (found := self._queue.most_urgent()) is not None:
            leader, lane = found
            hopeless = (
                [leader] if self._hopeless(leader, now_s) else self._worth_dropping(leader, lane, now_s)
            )
            if not hopeless:
                _Filling(self, plan, now_s).fill(lane, leader)
                break
            for ticket in hopeless:
                self._queue.remove(ticket)
            plan.dropped += hopeless
        return plan

    def _hopeless(self, ticket: Ticket, now_s: float) -> bool:
        """Whether it would be late even if its batch began now and held nothing else."""
        return ticket.deadline_s < now_s + (0.0 if ticket.probe else self._alone_s(ticket))

    def _alone_s(self, ticket: Ticket) -> float:
        latency, rows = ticket.group.latency, ticket.waiting_rows
        whole, rest = divmod(rows, self.max_batch_rows)
        needed_s = latency.safe_s(rest, ticket.length) if rest else 0.0
        if whole:
            needed_s += whole * latency.safe_s(self.max_batch_rows, ticket.length)
        return needed_s

    def _worth_dropping(self, leader: Ticket, lane: Lane, now_s: float) -> list[Ticket]:
        """The requests at the head of a lane that cost more others than they are worth; mostly none."""
        latency = leader.group.latency
        pace = Pace.of(latency, leader.length, self.max_batch_rows, self.slo_s, self.slots)
        full = min(pace.batch_rows, lane.rows)
        small = latency.rows_within(leader.deadline_s - now_s, leader.length, full)
        if leader.probe or small >= full:
            return []
        after_s = now_s + latency.estimate_s(small, leader.length)
        if self.backlog.all_met(pace, after_s, small, leader.level):
            return []
        rate = pace.batch_rows / latency.estimate_s(pace.batch_rows, leader.length)
        heads: list[Ticket] = []
        best, best_value = 0, -float("inf")
        rows_left = lane.rows
        while (ticket := self._queue.pop(lane, {leader.level})) is not None:
            possible = min(pace.batch_rows, rows_left)
            rows = latency.rows_within(ticket.deadline_s - now_s, ticket.length, possible)
            if rows >= ticket.waiting_rows:
                value = rows - rate * latency.estimate_s(rows, ticket.length)
                if value > best_value:
                    best, best_value = len(heads), value
            heads.append(ticket)
            rows_left -= ticket.waiting_rows
            if rows == possible or len(heads) > 2 * self.max_batch_rows:
                break
        for ticket in heads:
            self._queue.push_back(lane, ticket)
        return heads[:best]


class _Filling:
    """One batch while it is being filled."""

    def __init__(self, planner: Planner, plan: Plan, now_s: float) -> None:
        self._planner = planner
        self._queue = planner._queue
        self._plan = plan
        self._now_s = now_s
        self._rows = 0
        self._elements = 0
        self._length = 0
        self._tightest_s = float("inf")

    def fill(self, lane: Lane, leader: Ticket) -> None:
        """Put the leader into the batch, then whatever may join it."""
        self._most_rows = self._planner.max_batch_rows
        latency, slo_s = leader.group.latency, self._planner.slo_s
        self._goal_rows = min(lane.rows, latency.working_rows(self._most_rows, leader.length, slo_s))
        if not leader.probe:
            left_s = leader.deadline_s - self._now_s
            self._goal_rows = min(
                self._goal_rows, latency.rows_within(left_s, leader.length, self._most_rows)
            )
        self._take(leader, min(leader.waiting_rows, self._most_rows))
        for near in self._lanes(lane):
            self._join(near)

    def _lanes(self, lane: Lane) -> Iterator[Lane]:
        yield lane
        for steps in _NEIGHBOURS:
            if self._rows < self._most_rows and (near := self._queue.near(lane, steps)) is not None:
                yield near

    def _join(self, lane: Lane) -> None:
        """Take from a lane what fits, in order."""
        passed: list[Ticket] = []
        levels = set(WEIGHTS)
        while self._rows < self._most_rows and len(passed) < _PASS_OVER:
            ticket = self._queue.pop(lane, levels)
            if ticket is None:
                break
            if self._planner._hopeless(ticket, self._now_s):
                self._queue.remove(ticket)
                self._plan.dropped.append(ticket)
            elif self._fits(ticket):
                self._take(ticket, ticket.waiting_rows)
            else:
                passed.append(ticket)
        for ticket in passed:
            self._queue.push_back(lane, ticket)

    def _fits(self, ticket: Ticket) -> bool:
        rows = self._rows + ticket.waiting_rows
        length = max(self._length, ticket.length)
        latency = ticket.group.latency
        if rows > self._most_rows:
            return False
        if length and self._elements + ticket.waiting_rows * ticket.length < (1 - MAX_WASTE) * rows * length:
            return False
        if not latency.known:
            return True
        if rows > latency.working_rows(self._most_rows, length, self._planner.slo_s):
            return False
        # Whoever joins must not keep the batch smaller than its leader allows.
        goal_s = latency.safe_s(max(rows, self._goal_rows), length)
        if goal_s > ticket.deadline_s - self._now_s:
            return False
        return latency.safe_s(rows, length) <= self._tightest_s - self._now_s

    def _take(self, ticket: Ticket, rows: int) -> None:
        start = ticket.planned_rows
        self._queue.take(ticket, rows)
        self._plan.batch.append(Part(ticket, start, start + rows))
        self._rows += rows
        self._elements += rows * ticket.length
        self._length = max(self._length, ticket.length)
        if not ticket.probe:
            self._tightest_s = min(self._tightest_s, ticket.deadline_s)
