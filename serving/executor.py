"""Runs a model off the event loop, batch by batch, and gives each request its own outcome.

The order is: take the slot, then cut the batch (`serving.batcher` says why). A batch that raises is run
again in halves until the requests that make it raise stand alone; the others get their answers. An
outcome is a value, an answer or a failure, so that no exception of one request can reach another.

Everything but `_run` happens on the event loop, so nothing here is locked. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import DeadlineExceeded, NotReady
from serving.admission import Admission
from serving.batcher import Batcher, Part, Plan, Ticket
from serving.runtimes.base import Runtime

Arrays = dict[str, NDArray[Any]]
_POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Answer:
    """The model ran; every output has the request's rows, in order."""

    outputs: Arrays


@dataclass(frozen=True, slots=True)
class Failure:
    """The request was not answered, and why."""

    error: Exception


Outcome = Answer | Failure


class BatchObserver(Protocol):
    """Who is told of what happens to batches, on the event loop."""

    def ran(self, rows: int, duration_s: float) -> None:
        """A batch ran."""
        ...

    def dropped(self, tickets: int) -> None:
        """Requests ran out of time before their batch did."""
        ...


@dataclass(slots=True, eq=False)
class _Work:
    """What the executor keeps beside a ticket."""

    inputs: Arrays
    future: asyncio.Future[Outcome]
    pieces: dict[int, Arrays] = field(default_factory=dict)
    """Outputs by first row, where the request was cut into several batches."""
    rows_done: int = 0


class Executor:
    """One model's queue and its slots. Made, and called, on the event loop it serves.

    Args:
        max_batch_size: rows run at once.
        max_queue_rows: rows that may wait.
        slots: batches run at the same time, each in a thread of its own.
    """

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_queue_rows: int,
        slots: int = 1,
        observer: BatchObserver | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._batcher = Batcher(max_batch_size=max_batch_size, max_queue_rows=max_queue_rows)
        self._admission = Admission(max_queue_rows=max_queue_rows)
        self._threads = ThreadPoolExecutor(slots, thread_name_prefix="tandem-model")
        self._slots = self._free_slots = slots
        self._observer = observer
        self._clock = clock
        self._closed = False

    @property
    def waiting_rows(self) -> int:
        """Rows in the queue."""
        return self._batcher.waiting_rows

    async def submit(self, runtime: Runtime, inputs: Arrays, rows: int, deadline_s: float) -> Outcome:
        """Queue a request and wait for its outcome. Being cancelled takes it out of the queue.

        Args:
            runtime: the one that its inputs were checked for; requests of one batch share it.
            inputs: every input of the model, axis 0 being `rows`.
            deadline_s: on the executor's clock; once it has passed, the request isn't run.
        """
        if self._closed:
            return Failure(NotReady("the replica is shutting down", retry_after_s=1, fix="try again"))
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        ticket = Ticket(rows, deadline_s, group=runtime, payload=_Work(inputs, future))
        if not self._batcher.add(ticket):
            return Failure(self._admission.refusal(rows, self._batcher.waiting_rows))
        self._fill_slots()
        try:
            return await future
        except asyncio.CancelledError:
            self._batcher.cancel(ticket)
            raise

    def drop_expired(self) -> None:
        """Answer those whose time has run out while the model is held up by a long batch."""
        self._drop(self._batcher.expire(self._clock.monotonic_s()))

    async def close(self) -> None:
        """Run what is accepted, take nothing more, and end the threads."""
        self._closed = True
        while len(self._batcher) or self._free_slots < self._slots:
            await asyncio.sleep(_POLL_S)
        self._threads.shutdown(wait=True)

    def _fill_slots(self) -> None:
        while self._free_slots and len(self._batcher):
            plan = self._batcher.cut(self._clock.monotonic_s())
            self._drop(plan.expired)
            if not plan.batch:
                return
            self._free_slots -= 1
            started_s = self._clock.monotonic_s()
            running = asyncio.get_running_loop().run_in_executor(self._threads, _run, plan.batch)
            running.add_done_callback(partial(self._finish, plan, started_s))

    def _drop(self, expired: list[Ticket]) -> None:
        for ticket in expired:
            _resolve(
                ticket,
                Failure(
                    DeadlineExceeded(
                        "the request's time ran out before the model was free",
                        fix="try again with more time, or let more replicas run",
                    )
                ),
            )
        if expired and self._observer:
            self._observer.dropped(len(expired))

    def _finish(self, plan: Plan, started_s: float, done: asyncio.Future[list[Outcome]]) -> None:
        self._free_slots += 1
        duration_s = self._clock.monotonic_s() - started_s
        self._admission.ran(plan.rows, duration_s)
        # The next batch first: the model should not wait while answers are written.
        self._fill_slots()
        if self._observer:
            self._observer.ran(plan.rows, duration_s)
        for part, outcome in zip(plan.batch, done.result(), strict=True):
            self._deliver(part, outcome)

    def _deliver(self, part: Part, outcome: Outcome) -> None:
        ticket = part.ticket
        if isinstance(outcome, Failure):
            self._batcher.cancel(ticket)  # what is left of it need not run
            _resolve(ticket, outcome)
        elif part.rows == ticket.rows:
            _resolve(ticket, outcome)
        else:
            work: _Work = ticket.payload
            work.pieces[part.start] = outcome.outputs
            work.rows_done += part.rows
            if work.rows_done == ticket.rows:
                _resolve(ticket, Answer(_joined([work.pieces[start] for start in sorted(work.pieces)])))


def _resolve(ticket: Ticket, outcome: Outcome) -> None:
    future: asyncio.Future[Outcome] = ticket.payload.future
    if not future.done():
        future.set_result(outcome)


def _run(batch: Sequence[Part]) -> list[Outcome]:
    """One outcome for each part, in order; runs in a thread. Never raises."""
    runtime: Runtime = batch[0].ticket.group  # type: ignore[assignment]
    try:
        outputs = runtime.run(_joined([_slice(part.ticket.payload.inputs, part) for part in batch]))
        _check_rows(outputs, sum(part.rows for part in batch))
    except Exception as error:  # noqa: BLE001 - the edge of the model's code: it becomes a value
        if len(batch) == 1:
            return [Failure(error)]
        middle = len(batch) // 2
        return _run(batch[:middle]) + _run(batch[middle:])
    if len(batch) == 1:
        return [Answer(outputs)]
    stops = list(accumulate(part.rows for part in batch))
    return [
        Answer({name: array[stop - part.rows : stop] for name, array in outputs.items()})
        for part, stop in zip(batch, stops, strict=True)
    ]


def _slice(inputs: Arrays, part: Part) -> Arrays:
    if part.rows == part.ticket.rows:
        return inputs
    return {name: array[part.start : part.stop] for name, array in inputs.items()}


def _joined(pieces: Sequence[Arrays]) -> Arrays:
    """Pieces one after the other along axis 0."""
    if len(pieces) == 1:
        return pieces[0]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _check_rows(outputs: Arrays, rows: int) -> None:
    for name, array in outputs.items():
        if array.shape[:1] != (rows,):
            raise RuntimeError(f"output '{name}' has shape {array.shape} for {rows} rows")
