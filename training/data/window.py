"""One window of the plan as one worker uses it: which of its rows, when, and their arrays in that order.

Numbers and words are converted a row group at a time and strewn over the window's arrays in the order
of use, so that a batch is a part of each array, not a copy. Images stay files: decoded they take far
more memory.

Tried and left out: one matrix of all columns whose rows are gathered and then turned to columns; its
three passes take what the one pass here takes.

Knows nothing of batches, nor of which window comes when.
"""

from __future__ import annotations

import threading
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.data.converter import Converter
from training.data.dataset import Dataset
from training.data.plan import Plan, PlanWindow
from training.data.share import Share
from training.task import Arrays


@dataclass(frozen=True)
class Order:
    """Which rows of one window this worker uses, and when."""

    positions: NDArray[np.int64]
    """Ascending."""
    row_ids: NDArray[np.int64]
    window: PlanWindow
    goes_to: NDArray[np.int64]
    """For each row of the window's groups, laid end to end, its place in `positions`, or -1. So a group
    is gone through in its own order, and memory is jumped about in only where it is written."""


@dataclass(frozen=True)
class Window:
    """The rows of one window that this worker uses, in the order in which it uses them."""

    positions: NDArray[np.int64]
    """Ascending."""
    row_ids: NDArray[np.int64]
    arrays: Arrays
    images: pa.Table
    """In the dataset's order: a copy of the files would cost more than it saves."""
    image_places: NDArray[np.int64]
    """Where in `images` each position's are."""

    def places(self, positions: NDArray[np.int64]) -> slice | NDArray[np.int64]:
        """Where some ascending positions stand, the last of which may repeat.

        Positions that follow one another, as they do but for padding, are parts of the window's own
        memory: each row is used once, so nobody else is handed it.
        """
        first = int(np.searchsorted(self.positions, positions[0]))
        if positions[-1] - positions[0] == len(positions) - 1:
            return slice(first, first + len(positions))
        return np.searchsorted(self.positions, positions)

    def files(self, places: slice | NDArray[np.int64]) -> pa.Table:
        """The image files at some places."""
        return self.images.take(pa.array(self.image_places[places]))


def ordered(plan: Plan, share: Share, epoch: int, number: int) -> Order:
    """What a worker uses of window `number` of an epoch."""
    low, high = plan.window_bounds(epoch)[number : number + 2]
    positions = share.in_window(epoch, int(low), int(high))
    places = positions - low
    window = plan.window(epoch, number)
    goes_to = np.full(len(window.order), -1, np.int64)
    goes_to[window.order[places]] = np.arange(len(places))
    row_ids = plan.window_row_ids(epoch, number)[places]
    return Order(positions, row_ids, window, goes_to)


class WindowReader:
    """Reads windows; each row group is read, converted and strewn as a job of its own.

    Args:
        pool: does the jobs.
        given_up: set when nobody waits any more.
        turn: from 0 to 1. Each worker begins elsewhere in a window, so that those of a machine find in its
            cache what another fetched.
    """

    def __init__(
        self,
        dataset: Dataset,
        converter: Converter,
        pool: Executor,
        given_up: threading.Event,
        turn: float,
    ) -> None:
        self._dataset = dataset
        self._converter = converter
        self._pool = pool
        self._given_up = given_up
        self._turn = turn

    def read(self, order: Order) -> Window:
        """The window's rows.

        Raises:
            BadInput: a row that can't be used; names dataset, file, row group and row.
            StorageError: the dataset can't be read.
        """
        arrays = self._converter.room(len(order.row_ids))
        nothing = self._dataset.empty([tensor.name for tensor in self._converter.images])

        def fill(job: tuple[int, int, int]) -> tuple[pa.Table, NDArray[np.int64]]:
            group, start, stop = job
            targets = order.goes_to[start:stop]
            used = np.flatnonzero(targets >= 0)
            if not len(used):
                return nothing, targets[:0]
            table = self._dataset.read_group(group, self._converter.columns, given_up=self._given_up)
            if len(used) < len(targets):
                table, targets = table.take(pa.array(used)), targets[used]
            ids = used + self._dataset.row_groups[group].first_row
            written = slice(targets[0], targets[-1] + 1) if _ascend_by_one(targets) else targets
            for name, values in self._converter.plain(table, ids).items():
                arrays[name][written] = values
            return table.select(nothing.column_names), targets

        filled = list(self._pool.map(fill, self._jobs(order.window)))
        images = pa.concat_tables([nothing, *(part for part, _ in filled)]).combine_chunks()
        image_places = np.empty(len(order.row_ids) if self._converter.images else 0, np.int64)
        if self._converter.images:
            laid = np.concatenate([targets for _, targets in filled])
            image_places[laid] = np.arange(len(laid))
        return Window(order.positions, order.row_ids, arrays, images, image_places)

    def _jobs(self, window: PlanWindow) -> list[tuple[int, int, int]]:
        """For each row group its number, and where it begins and ends in the row of groups."""
        bounds = pairwise(window.starts.tolist())
        jobs = [(group, *bound) for group, bound in zip(window.groups.tolist(), bounds, strict=True)]
        first = int(self._turn * len(jobs))
        return jobs[first:] + jobs[:first]


def _ascend_by_one(numbers: NDArray[np.int64]) -> bool:
    return bool(numbers[-1] - numbers[0] == len(numbers) - 1 and (np.diff(numbers) == 1).all())
