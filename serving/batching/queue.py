"""Requests in order: by deadline within a level, in lanes of those that may share a batch.

A *lane* holds the requests of one group, one shape and one class of length. Each lane has a heap by deadline
for each level, and each level a heap of its lanes' heads, so that the most urgent request is found in
O(log n) however many wait. Cancelled requests stay in the heaps until they are met, and count no more.

Knows nothing of latency: it orders, it doesn't judge.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import count

from serving.batching.backlog import Backlog
from serving.batching.ticket import WEIGHTS, Ticket

_Entry = tuple[float, int, Ticket]
_Key = tuple[int, Hashable, int | None]


@dataclass(slots=True, eq=False)
class Lane:
    """Requests that may share a batch."""

    key: _Key
    heaps: dict[int, list[_Entry]] = field(default_factory=lambda: {level: [] for level in WEIGHTS})
    rows: int = 0
    """Rows that wait."""

    def head(self, level: int) -> Ticket | None:
        """The most urgent of a level."""
        heap = self.heaps[level]
        while heap and heap[0][2].done:
            heapq.heappop(heap)
        return heap[0][2] if heap else None


class Queue:
    """All that waits, with its backlog kept beside it."""

    def __init__(self, slo_s: float) -> None:
        self.backlog = Backlog(slo_s)
        self._lanes: dict[_Key, Lane] = {}
        self._heads: dict[int, list[tuple[float, int, Ticket, Lane]]] = {level: [] for level in WEIGHTS}
        self._served = dict.fromkeys(WEIGHTS, 0.0)
        self._turn = 0.0
        self._waiting = dict.fromkeys(WEIGHTS, 0)
        self._arrivals: deque[Ticket] = deque()
        self._order = count()

    def __len__(self) -> int:
        """Requests that wait."""
        return sum(self._waiting.values())

    def add(self, ticket: Ticket) -> None:
        """Take a request in."""
        level = ticket.level
        if not self._waiting[level]:
            # A level that had nothing waiting has saved nothing up.
            self._served[level] = max(self._served[level], self._turn)
        self._waiting[level] += 1
        key = _key(ticket)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(key)
        lane.rows += ticket.rows
        ticket.order = next(self._order)
        self._push(lane, ticket)
        self.oldest_arrival_s()  # forgets those that are done, which nobody else may do for hours
        self._arrivals.append(ticket)
        self.backlog.add(ticket)

    def remove(self, ticket: Ticket) -> None:
        """A request is given up: what of it waits never runs."""
        if not ticket.done:
            self._leave(ticket, ticket.waiting_rows)
            ticket.done = True
            self._waiting[ticket.level] -= 1

    def take(self, ticket: Ticket, rows: int) -> None:
        """Rows of a request go into a batch."""
        self._turn = self._served[ticket.level]
        self._served[ticket.level] += rows / WEIGHTS[ticket.level]
        self._leave(ticket, rows)
        ticket.planned_rows += rows
        if ticket.planned_rows == ticket.rows:
            ticket.done = True
            self._waiting[ticket.level] -= 1

    def most_urgent(self) -> tuple[Ticket, Lane] | None:
        """The earliest deadline of the level whose turn it is, and its lane."""
        for level in self._by_turn():
            if (found := self.earliest(level)) is not None:
                return found
        return None

    def earliest(self, level: int) -> tuple[Ticket, Lane] | None:
        """The earliest deadline of a level, and its lane."""
        heads = self._heads[level]
        while heads:
            _, _, ticket, lane = heads[0]
            head = lane.head(level)
            if head is ticket:
                return ticket, lane
            heapq.heappop(heads)
            if head is not None:
                heapq.heappush(heads, (*lane.heaps[level][0], lane))
        return None

    def pop(self, lane: Lane, levels: set[int]) -> Ticket | None:
        """The next request of a lane, of that of `levels` whose turn it is; None where none is left."""
        for level in self._by_turn():
            if level in levels and (ticket := lane.head(level)) is not None:
                heapq.heappop(lane.heaps[level])
                return ticket
        return None

    def push_back(self, lane: Lane, ticket: Ticket) -> None:
        """Return what `pop` gave and `take` didn't use up."""
        if not ticket.done:
            self._push(lane, ticket)

    def near(self, lane: Lane, steps: int) -> Lane | None:
        """The lane whose requests are that many classes of length longer, if anything waits there."""
        group, shape, octave = lane.key
        found = self._lanes.get((group, shape, octave + steps)) if octave is not None else None
        return found if found is not None and found.rows else None

    def oldest_arrival_s(self) -> float | None:
        """When the request that has waited longest came."""
        while self._arrivals and self._arrivals[0].done:
            self._arrivals.popleft()
        return self._arrivals[0].arrived_s if self._arrivals else None

    def _by_turn(self) -> list[int]:
        """Levels with something waiting, in the order in which they have had least, by their weights."""
        waiting = [level for level, requests in self._waiting.items() if requests]
        return waiting if len(waiting) < 2 else sorted(waiting, key=self._served.__getitem__)

    def _push(self, lane: Lane, ticket: Ticket) -> None:
        heap = lane.heaps[ticket.level]
        entry = (ticket.deadline_s, ticket.order, ticket)
        heapq.heappush(heap, entry)
        if heap[0] is entry:
            heapq.heappush(self._heads[ticket.level], (*entry, lane))

    def _leave(self, ticket: Ticket, rows: int) -> None:
        self.backlog.remove(ticket, rows)
        lane = self._lanes[_key(ticket)]
        lane.rows -= rows
        if not lane.rows:
            del self._lanes[lane.key]


def _key(ticket: Ticket) -> _Key:
    return id(ticket.group), ticket.shape, ticket.octave
