"""Runs one batch, in a thread, and gives each request of it an outcome of its own.

A batch that raises is run again in halves until the requests that make it raise stand alone; the others get
their answers. An outcome is a value, an answer or a failure, so that no exception of one request can reach
another. Knows nothing of queues, deadlines or event loops, beyond carrying a request's future.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from serving.batching.form import Arrays
from serving.batching.model import BatchModel
from serving.batching.ticket import Part


@dataclass(frozen=True, slots=True)
class Answer:
    """The model ran; every output has the request's rows, in order."""

    outputs: Arrays


@dataclass(frozen=True, slots=True)
class Failure:
    """The request was not answered, and why."""

    error: Exception


Outcome = Answer | Failure


@dataclass(slots=True, eq=False)
class Work:
    """What the executor keeps beside a ticket."""

    inputs: Arrays
    future: asyncio.Future[Outcome]
    began_s: float = 0.0
    """When its first batch began."""
    finished_s: float = 0.0
    """When its last batch was done."""
    pieces: dict[int, Arrays] = field(default_factory=dict)
    """Outputs by first row, where the request was cut into several batches."""
    rows_done: int = 0


def run(model: BatchModel, batch: Sequence[Part]) -> list[Outcome]:
    """One outcome for each part, in order; runs in a thread. Never raises."""
    pieces = [_slice(part.ticket.payload.inputs, part) for part in batch]
    rows = [part.rows for part in batch]
    try:
        outputs = model.runtime.run(model.form.joined(pieces))
        _check_rows(outputs, sum(rows))
    except Exception as error:  # noqa: BLE001 - the edge of the model's code: it becomes a value
        if len(batch) == 1:
            return [Failure(error)]
        middle = len(batch) // 2
        return run(model, batch[:middle]) + run(model, batch[middle:])
    if len(batch) == 1:
        return [Answer(outputs)]
    return [Answer(own) for own in model.form.parted(outputs, pieces, rows)]


def _slice(inputs: Arrays, part: Part) -> Arrays:
    if part.rows == part.ticket.rows:
        return inputs
    return {name: array[part.start : part.stop] for name, array in inputs.items()}


def rejoined(work: Work) -> Arrays:
    """The outputs of a request that was cut into several batches; they all have its own length."""
    pieces = [work.pieces[start] for start in sorted(work.pieces)]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def _check_rows(outputs: Arrays, rows: int) -> None:
    for name, array in outputs.items():
        if array.shape[:1] != (rows,):
            raise RuntimeError(f"output '{name}' has shape {array.shape} for {rows} rows")
