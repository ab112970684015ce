"""Which requests run together next: a bounded FIFO of rows, cut on demand.

A batch is cut when the model is free, never before and never by a timer. An idle model runs a single
request at once; while it is busy, requests gather and leave together. (A batcher that closes batches
while the model is busy, as `@serve.batch` does, keeps them small exactly when they should grow.)

A planner: its state is the queue, its only inputs are tickets and `now_s`. It knows nothing of tensors,
threads, event loops or HTTP, so tests and simulations drive it with a clock of their own.

The rules:
- First in, first out; nobody overtakes.
- A request's rows stay together, unless there are more of them than a batch holds: then they are cut
  in order, and the remainder shares its batch with whoever is next.
- Requests of different groups (versions of a model) never share a batch.
- A ticket that was cancelled, or whose deadline has passed, is dropped; what is dropped never runs.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True, eq=False)
class Ticket:
    """One request in the queue. `group` is compared by identity; `payload` belongs to the caller."""

    rows: int
    deadline_s: float
    group: object = None
    payload: Any = None
    planned_rows: int = 0
    """Rows that batches cut so far have taken, from the first on."""
    cancelled: bool = False


@dataclass(slots=True)
class Part:
    """Rows `start` to `stop` of a ticket, as they stand in a batch."""

    ticket: Ticket
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many rows."""
        return self.stop - self.start


@dataclass(slots=True)
class Plan:
    """What to run now, and who ran out of time. `batch` is empty where nothing waits."""

    batch: list[Part]
    expired: list[Ticket]

    @property
    def rows(self) -> int:
        """Rows in the batch."""
        return sum(part.rows for part in self.batch)


class Batcher:
    """The queue of one slot or of several slots that run the same model.

    Args:
        max_batch_size: rows run at once.
        max_queue_rows: rows that may wait.
    """

    def __init__(self, *, max_batch_size: int, max_queue_rows: int) -> None:
        if not 1 <= max_batch_size <= max_queue_rows:
            raise ValueError(f"1 <= max_batch_size <= max_queue_rows, not {max_batch_size}, {max_queue_rows}")
        self.max_batch_size = max_batch_size
        self.max_queue_rows = max_queue_rows
        self.waiting_rows = 0
        self._queue: deque[Ticket] = deque()

    def __len__(self) -> int:
        """Tickets in the queue, cancelled ones that weren't met yet included."""
        return len(self._queue)

    def add(self, ticket: Ticket) -> bool:
        """Queue a ticket; False, and nothing is changed, where its rows have no room."""
        if self.waiting_rows + ticket.rows > self.max_queue_rows:
            return False
        self.waiting_rows += ticket.rows
        self._queue.append(ticket)
        return True

    def cancel(self, ticket: Ticket) -> None:
        """Give up a ticket: what of it waits leaves the queue's count now, and never runs."""
        if not ticket.cancelled:
            ticket.cancelled = True
            self.waiting_rows -= ticket.rows - ticket.planned_rows

    def cut(self, now_s: float) -> Plan:
        """The next batch, to be run at once. Call it with a free slot in hand.

        Every ticket met whose deadline is before `now_s` is dropped and returned as expired.
        """
        plan = Plan([], [])
        room = self.max_batch_size
        while self._queue and room:
            ticket = self._queue[0]
            if ticket.cancelled:
                self._queue.popleft()
            elif ticket.deadline_s < now_s:
                self._queue.popleft()
                self.cancel(ticket)
                plan.expired.append(ticket)
            else:
                taken = self._rows_to_take(ticket, room, plan)
                if taken == 0:
                    break
                start = ticket.planned_rows
                ticket.planned_rows = start + taken
                plan.batch.append(Part(ticket, start, ticket.planned_rows))
                self.waiting_rows -= taken
                room -= taken
                if ticket.planned_rows == ticket.rows:
                    self._queue.popleft()
        return plan

    def expire(self, now_s: float) -> list[Ticket]:
        """Drop every ticket whose deadline is before `now_s`, wherever it stands."""
        expired = [t for t in self._queue if not t.cancelled and t.deadline_s < now_s]
        for ticket in expired:
            self.cancel(ticket)
        if expired:
            self._queue = deque(ticket for ticket in self._queue if not ticket.cancelled)
        return expired

    def _rows_to_take(self, ticket: Ticket, room: int, plan: Plan) -> int:
        if plan.batch and plan.batch[0].ticket.group is not ticket.group:
            return 0
        left = ticket.rows - ticket.planned_rows
        if left <= room:
            return left
        # Only what is larger than a whole batch is ever cut, and then from an empty batch on.
        return room if left > self.max_batch_size and not plan.batch else 0
