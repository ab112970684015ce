"""Runs models off the event loop, batch by batch, and gives each request its own outcome.

It obeys the door and the planner, and tells the latency model how long batches took. Everything here happens
on the event loop, so nothing is locked; only `serving.batching.run` is called in threads. Knows nothing of
HTTP.
"""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import DeadlineExceeded, NotReady, Overloaded
from serving.account import Account
from serving.batching.door import MIN_RETRY_S, Door
from serving.batching.form import Arrays
from serving.batching.model import BatchModel
from serving.batching.planner import Planner
from serving.batching.run import Answer, Failure, Outcome, Work, rejoined, run
from serving.batching.ticket import NORMAL, Part, Plan, Ticket
from serving.load import Load, LoadWindow

MOST_INLINE_S = 0.002
"""What a tiny model's batch may take of the event loop; beyond, even its batches run in threads."""
_POLL_S = 0.01
NETWORK_SHARE, MAX_NETWORK_S = 0.02, 0.005
"""Of the SLO, what is kept for the network, which can't be seen from here."""
MAX_WAY_BACK_SHARE = 0.1
_UP, _DOWN = 0.2, 0.002
_WEIGHT_OF_NEWEST = 0.05
_COUNT_EVERY_S = 0.05


class BatchObserver(Protocol):
    """Who is told of what happens to batches, on the event loop."""

    def ran(self, rows: int, duration_s: float) -> None:
        """A batch ran."""
        ...

    def dropped(self, tickets: int) -> None:
        """Requests ran out of time before their batch did."""
        ...

    def refused(self, reason: str) -> None:
        """A request wasn't let in: `queue_full` or `deadline`."""
        ...

    def late(self) -> None:
        """A request ran, and was done after its deadline."""
        ...


class Executor:
    """One model's queue and its slots. Made, and called, on the event loop it serves.

    Args:
        max_batch_size: rows run at once.
        max_queue_rows: rows that may wait.
        slo_s: the longest time that requests usually have.
        slots: batches run at the same time, each in a thread of its own.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_queue_rows: int,
        slo_s: float,
        slots: int = 1,
        observer: BatchObserver | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._planner = Planner(max_batch_rows=max_batch_size, slo_s=slo_s, slots=slots)
        self._door = Door(
            max_batch_rows=max_batch_size, max_queue_rows=max_queue_rows, slo_s=slo_s, slots=slots
        )
        self._threads = ThreadPoolExecutor(slots, thread_name_prefix="tandem-model")
        self._slots = slots
        self._max_queue_rows = max_queue_rows
        self._ends_s: dict[int, float] = {}
        """When each running batch should be done, by the identity of its plan."""
        self._network_s = min(NETWORK_SHARE * slo_s, MAX_NETWORK_S)
        self._most_way_back_s = MAX_WAY_BACK_SHARE * slo_s
        self._held_up_s = 0.0
        """How long answers rarely wait for their turn on the event loop: a batch's are ready all at once."""
        self._observer = observer
        self._clock = clock
        self._window = LoadWindow(clock.monotonic_s())
        self._counted_s, self._coming = -math.inf, 0.0
        self._latest: BatchModel | None = None
        self._mean_length = 0.0
        self._closed = False
        self._loop = asyncio.get_running_loop()
        self._will_fill = False

    @property
    def waiting_rows(self) -> int:
        """Rows in the queue."""
        return self._planner.waiting_rows

    def load(self) -> Load:
        """How busy it is; costs some microseconds."""
        now_s = self._clock.monotonic_s()
        arrivals, arriving_rows, lost, busy = self._window.rates(now_s)
        return Load(
            waiting_requests=len(self._planner),
            oldest_waiting_s=self._planner.oldest_s(now_s),
            busy_fraction=min(busy / self._slots, 1.0),
            capacity_rows_per_s=self._capacity_rows_per_s(),
            arrivals_per_s=arrivals,
            arriving_rows_per_s=arriving_rows,
            lost_per_s=lost,
        )

    async def submit(
        self,
        model: BatchModel,
        inputs: Arrays,
        rows: int,
        deadline_s: float,
        *,
        level: int = NORMAL,
        account: Account | None = None,
    ) -> Outcome:
        """Queue a request and wait for its outcome. Being cancelled takes it out of the queue.

        Args:
            model: the one that its inputs were checked for; requests of one batch share it.
            inputs: every input of the model, axis 0 being `rows`.
            deadline_s: on the executor's clock, when the client should have the answer. A request that
                can't make it isn't let in, or isn't run.
            level: its priority, a key of `serving.batching.ticket.WEIGHTS`.
            account: told how long it waited and ran.
        """
        if self._closed:
            return Failure(NotReady("the replica is shutting down", retry_after_s=1, fix="try again"))
        now_s = self._clock.monotonic_s()
        size = model.form.size(inputs)
        future: asyncio.Future[Outcome] = self._loop.create_future()
        work = Work(inputs, future)
        ticket = Ticket(
            rows,
            deadline_s - min(self._network_s + self._held_up_s, self._most_way_back_s),
            model,
            size.length,
            size.shape,
            size.octave,
            level,
            now_s,
            work,
        )
        self._window.arrived(now_s, rows)
        self._latest = model
        self._mean_length += _WEIGHT_OF_NEWEST * (size.length - self._mean_length)
        refusal = self._door.refusal(
            ticket,
            self._planner.backlog,
            now_s=now_s,
            free_s=self._free_s(now_s),
            idle=self._idle,
            coming_rows_per_s=self._coming_rows_per_s(now_s),
        )
        if refusal is not None:
            self._window.lost(now_s)
            if self._observer:
                full = self._planner.waiting_rows + rows > self._max_queue_rows
                self._observer.refused("queue_full" if full else "deadline")
            return Failure(refusal)
        self._planner.add(ticket)
        self._fill_soon()
        try:
            outcome = await future
            if work.finished_s:
                self._note_held_up(self._clock.monotonic_s() - work.finished_s)
                if account is not None:
                    account.queue_s = work.began_s - now_s
                    account.run_s = work.finished_s - work.began_s
            return outcome
        except asyncio.CancelledError:
            self._planner.cancel(ticket)
            raise

    def drop_expired(self) -> None:
        """Answer those whose time has run out while the model is held up by a long batch."""
        now_s = self._clock.monotonic_s()
        self._drop(self._planner.expire(now_s), now_s)

    async def close(self) -> None:
        """Run what is accepted, take nothing more, and end the threads."""
        self._closed = True
        while len(self._planner) or self._ends_s:
            await asyncio.sleep(_POLL_S)
        self._threads.shutdown(wait=True)

    @property
    def _idle(self) -> bool:
        return not self._planner.waiting_rows and len(self._ends_s) < self._slots

    def _free_s(self, now_s: float) -> float:
        """When a slot should be free: now, or when the first of the running batches should be done."""
        if len(self._ends_s) < self._slots:
            return now_s
        return max(now_s, min(self._ends_s.values()))

    def _coming_rows_per_s(self, now_s: float) -> float:
        if now_s >= self._counted_s + _COUNT_EVERY_S:
            self._counted_s = now_s
            self._coming = self._window.rates(now_s)[1]
        return self._coming

    def _capacity_rows_per_s(self) -> float | None:
        if self._latest is None or not self._latest.latency.known:
            return None
        latency, length = self._latest.latency, int(self._mean_length)
        rows = latency.working_rows(self._planner.max_batch_rows, length, self._planner.slo_s)
        return self._slots * rows / latency.estimate_s(rows, length)

    def _note_held_up(self, held_up_s: float) -> None:
        """Quick to rise and slow to fall, so that about one in a hundred is above it."""
        more_s = held_up_s - self._held_up_s
        self._held_up_s += more_s * (_UP if more_s > 0 else _DOWN)

    def _fill_soon(self) -> None:
        """Fill free slots once all that is ready on the event loop has run, so that it runs together."""
        if not self._will_fill and len(self._ends_s) < self._slots and self._planner.waiting_rows:
            self._will_fill = True
            self._loop.call_soon(self._fill_slots)

    def _fill_slots(self) -> None:
        self._will_fill = False
        while len(self._ends_s) < self._slots and self._planner.waiting_rows:
            now_s = self._clock.monotonic_s()
            plan = self._planner.cut(now_s)
            self._drop(plan.dropped, now_s)
            if not plan.batch:
                return
            model: BatchModel = plan.batch[0].ticket.group  # type: ignore[assignment]
            rows, length = plan.rows, plan.length
            if model.is_tiny and model.latency.safe_s(rows, length) <= MOST_INLINE_S:
                self._finish(model, plan, now_s, run(model, plan.batch))
                return  # one at a time: connections are read between two of them
            self._ends_s[id(plan)] = now_s + model.latency.estimate_s(rows, length)
            running = self._loop.run_in_executor(self._threads, run, model, plan.batch)
            running.add_done_callback(partial(self._free_slot, model, plan, now_s))

    def _drop(self, dropped: list[Ticket], now_s: float) -> None:
        for ticket in dropped:
            _resolve(ticket, Failure(_too_late(ticket, now_s)))
        if dropped:
            self._window.lost(now_s, len(dropped))
            if self._observer:
                self._observer.dropped(len(dropped))

    def _free_slot(
        self, model: BatchModel, plan: Plan, started_s: float, done: asyncio.Future[list[Outcome]]
    ) -> None:
        del self._ends_s[id(plan)]
        self._finish(model, plan, started_s, done.result())

    def _finish(self, model: BatchModel, plan: Plan, started_s: float, outcomes: list[Outcome]) -> None:
        now_s = self._clock.monotonic_s()
        if not any(isinstance(outcome, Failure) for outcome in outcomes):
            if model.seen is not None:
                model.seen(plan.rows, plan.length, now_s - started_s)
            model.latency.observe(plan.rows, plan.length, now_s - started_s)
        self._window.ran(now_s, now_s - started_s)
        # The next batch first: the model should not wait while answers are written.
        self._fill_soon()
        if self._observer:
            self._observer.ran(plan.rows, now_s - started_s)
        for part, outcome in zip(plan.batch, outcomes, strict=True):
            self._deliver(part, outcome, started_s, now_s)

    def _deliver(self, part: Part, outcome: Outcome, started_s: float, now_s: float) -> None:
        ticket = part.ticket
        work: Work = ticket.payload
        work.began_s = work.began_s or started_s
        if isinstance(outcome, Failure):
            self._planner.cancel(ticket)  # what is left of it need not run
        elif part.rows < ticket.rows:
            work.pieces[part.start] = outcome.outputs
            work.rows_done += part.rows
            if work.rows_done < ticket.rows:
                return
            outcome = Answer(rejoined(work))
        work.finished_s = now_s
        if now_s > ticket.deadline_s:
            self._window.lost(now_s)
            if self._observer:
                self._observer.late()
        _resolve(ticket, outcome)


def _too_late(ticket: Ticket, now_s: float) -> Exception:
    if ticket.deadline_s < now_s:
        return DeadlineExceeded(
            "the request's time ran out before the model was free",
            fix="try again with more time, or let more replicas run",
        )
    return Overloaded(
        "the request can't be answered in its time any more",
        retry_after_s=MIN_RETRY_S,
        got=f"{ticket.deadline_s - now_s:.3g} s left",
        fix="try again, give it more time, or let more replicas run",
    )


def _resolve(ticket: Ticket, outcome: Outcome) -> None:
    future: asyncio.Future[Outcome] = ticket.payload.future
    if not future.done():
        future.set_result(outcome)
