"""Who is let in: a request whose deadline, and those of whoever waits behind it, can be kept.

It decides when a request comes, by the backlog, the learned latency and when the model will be free, and
keeps nothing of what it decided: there is no state to swing back from. While nothing has been learned,
everything is let in that there is room for. Where what was learned says no although the model is idle, a
request a second is let in all the same, to find out whether that still holds (a *probe*).
"""

from __future__ import annotations

import math

from cluster.errors import Overloaded, TooLarge
from serving.batching.backlog import Backlog, Pace
from serving.batching.ticket import Ticket

MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0
PROBE_EVERY_S = 1.0


class Door:
    """The door of one queue.

    Args:
        max_batch_rows: rows run at once.
        max_queue_rows: rows that may wait, whatever their deadlines: a bound on memory.
        slo_s: the longest time that requests usually have.
        slots: batches run at the same time.
    """

    def __init__(self, *, max_batch_rows: int, max_queue_rows: int, slo_s: float, slots: int = 1) -> None:
        if not 1 <= max_batch_rows <= max_queue_rows:
            raise ValueError(f"1 <= max_batch_rows <= max_queue_rows, not {max_batch_rows}, {max_queue_rows}")
        self._max_batch_rows = max_batch_rows
        self._max_queue_rows = max_queue_rows
        self._slo_s = slo_s
        self._slots = slots
        self._probed_s = -math.inf

    def refusal(
        self,
        ticket: Ticket,
        backlog: Backlog,
        *,
        now_s: float,
        free_s: float,
        idle: bool,
        coming_rows_per_s: float,
    ) -> Overloaded | TooLarge | None:
        """Why a request is refused; None where it is let in, perhaps as a probe.

        Args:
            free_s: when a slot is free, as far as one knows: now or later.
            idle: whether nothing waits and a slot is free.
            coming_rows_per_s: rows that come, by recent experience: they fill up the batches of others.
        """
        waiting_rows = backlog.rows
        if waiting_rows + ticket.rows > self._max_queue_rows:
            return self._full(ticket, backlog)
        latency = ticket.group.latency
        if not latency.known:
            return None
        pace = Pace.of(
            latency, ticket.length, self._max_batch_rows, self._slo_s, self._slots, coming_rows_per_s
        )
        spare_s = backlog.spare_s(pace, now_s, free_s, ticket)
        if spare_s >= 0:
            return None
        if idle and ticket.deadline_s > now_s and now_s - self._probed_s >= PROBE_EVERY_S:
            self._probed_s = now_s
            ticket.probe = True
            return None
        retry_after_s = min(max(-spare_s, MIN_RETRY_S), MAX_RETRY_S)
        return Overloaded(
            "the request can't be answered in its time",
            retry_after_s=retry_after_s,
            got=f"{ticket.deadline_s - now_s:.3g} s, behind {waiting_rows} rows",
            allowed=f"{ticket.deadline_s - now_s - spare_s:.3g} s or more",
            fix=f"try again in {math.ceil(retry_after_s)} s, give it more time, or let more replicas run",
        )

    def _full(self, ticket: Ticket, backlog: Backlog) -> Overloaded | TooLarge:
        if ticket.rows > self._max_queue_rows:
            return TooLarge(
                "the request has more rows than the queue holds",
                got=f"{ticket.rows} rows",
                allowed=f"at most {self._max_queue_rows} rows",
                fix="send the rows in several requests",
            )
        pace = Pace.of(ticket.group.latency, ticket.length, self._max_batch_rows, self._slo_s, self._slots)
        emptied_s = backlog.rows * pace.row_worth_s
        retry_after_s = min(max(emptied_s, MIN_RETRY_S), MAX_RETRY_S)
        return Overloaded(
            "the queue is full",
            retry_after_s=retry_after_s,
            got=f"{ticket.rows} rows on top of {backlog.rows} waiting",
            allowed=f"{self._max_queue_rows} rows waiting",
            fix=f"try again in {math.ceil(retry_after_s)} s, or let more replicas run",
        )
