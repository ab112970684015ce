"""From Parquet to one worker's batches of arrays, along a plan, from a cursor, read ahead.

A window of the plan is read at once, and of it only the rows that this worker uses are kept: each
row group is read once an epoch, however small the batches are. Numbers and words are converted a row
group at a time and strewn over the window's arrays in the order of use, so that a batch is a part of
each array, not a copy; images are decoded a batch at a time, since decoded they take far more memory
than as files.

Threads: one prepares the window after the current; row groups are read, and images decoded, in a
small pool each. Where there are images, one more assembles batches in order; other batches are made
where they are asked for. None of the threads has a say in what a batch holds.

Tried and left out: one matrix of all columns whose rows are gathered and then turned to columns; its
three passes take what the one pass here takes.

Knows nothing of torch's devices or process groups, nor of checkpoints.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.data.columns import input_array, model_input, target_array
from training.data.dataset import Dataset
from training.data.plan import BatchRange, Plan, PlanWindow
from training.data.share import Share
from training.task import TARGET, Arrays, Task

_ROWS_PER_JOB = 32
_THREADS = (2, 8)


@dataclass(frozen=True, slots=True)
class HostBatch:
    """One worker's share of one global batch, in host memory. Axis 0 (B) is the same on every worker."""

    cursor: int
    """Before this batch."""
    next_cursor: int
    epoch: int
    global_rows: int
    """Rows of the batch over all workers, padding not counted."""
    arrays: Arrays
    """The model's inputs, and the target under `training.task.TARGET`."""
    weight: NDArray[np.float32]
    """[B]: 1 for a row, 0 for padding."""
    row_ids: NDArray[np.int64]
    """[B]: dataset rows, -1 for padding."""


class Loader:
    """Iterates one worker's batches from `cursor` to the end of the last epoch.

    Close it, or use it in a `with`. Reading ahead begins with the `with`, or with the first batch.
    Every worker gets the same number of batches with the same number of rows, ceil(global rows /
    world_size); what pads a shorter slice has weight 0.

    `task.augment`, where a task has it, is called with one row at a time and a generator that is a
    function of (seed, dataset, epoch, position), so its outcome doesn't depend on the workers either.

    Args:
        plan: of this dataset.
        task: names the inputs; `task.facts.label` is the target.
        global_batch_size: rows a step, over all workers.
        cursor: rows consumed since the start of training.
        epochs: how many there are in all; the loader ends before epoch number `epochs`.
        prefetch_batches: how many batches are kept ready.
        threads: of each pool; without it, the cores that this process may use, at least 2 and at most
            8. A remote dataset is read by 8 at least, since they wait more than they work.
    """

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        task: Task,
        *,
        global_batch_size: int,
        rank: int,
        world_size: int,
        cursor: int,
        epochs: int,
        prefetch_batches: int = 2,
        threads: int | None = None,
    ) -> None:
        assert plan.rows_per_epoch == dataset.rows, "the plan is of another dataset"
        self._plan = plan
        self._share = Share(plan, global_batch_size, rank, world_size, cursor)
        self._epochs = epochs
        self._next_cursor = cursor
        self._prefetch_batches = prefetch_batches
        threads = threads or min(max(len(os.sched_getaffinity(0)), _THREADS[0]), _THREADS[1])
        readers = max(threads, _THREADS[1]) if dataset.is_remote else threads
        self._assembler = ThreadPoolExecutor(1, "tandem-batches")
        self._preparer = ThreadPoolExecutor(1, "tandem-window")
        self._readers = ThreadPoolExecutor(readers, "tandem-read")
        self._decoders = ThreadPoolExecutor(threads, "tandem-decode")
        self._stopping = threading.Event()
        self._source = _Source(
            dataset, task, self._readers, self._decoders, self._stopping, rank / world_size
        )
        self._augment = _Augment(task, plan, self._decoders) if _augments(task) else None
        # A batch that is parts of a window takes less time to make than to hand to another thread.
        self._cuts_only = self._source.is_plain and self._augment is None
        self._ready: deque[Future[HostBatch]] = deque()
        self._windows: dict[tuple[int, int], Future[_Window]] = {}
        self._closed = False

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        """The next batch.

        Raises:
            BadInput: a value that the signature doesn't take.
            StorageError: the dataset can't be read.
        """
        self._read_ahead()
        try:
            if self._cuts_only:
                batch = self._assembled(self._taken())
            elif self._ready:
                batch = self._ready.popleft().result()
            else:
                raise StopIteration
        except BaseException:
            self.close()
            raise
        self._read_ahead()
        return batch

    def close(self) -> None:
        """Stop reading ahead and end the threads; no batch comes after. May be called twice."""
        self._closed = True
        self._stopping.set()
        self._ready.clear()
        pools = (self._assembler, self._preparer, self._readers, self._decoders)
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown(wait=True)
        self._windows.clear()

    def __enter__(self) -> Self:
        self._read_ahead()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _ended(self) -> bool:
        return self._closed or self._next_cursor >= self._epochs * self._plan.rows_per_epoch

    def _read_ahead(self) -> None:
        if self._cuts_only:
            if not self._ended and not self._windows:
                epoch, position = divmod(self._next_cursor, self._plan.rows_per_epoch)
                bounds = self._plan.window_bounds(epoch)
                self._window(epoch, int(np.searchsorted(bounds, position, side="right")) - 1)
            return
        while not self._ended and len(self._ready) <= self._prefetch_batches:
            self._ready.append(self._assembler.submit(self._assembled, self._taken()))

    def _taken(self) -> BatchRange:
        if self._ended:
            raise StopIteration
        batch = self._plan.batch(self._next_cursor, self._share.global_batch)
        self._next_cursor += batch.rows
        return batch

    def _assembled(self, batch: BatchRange) -> HostBatch:
        """The batch; called for one after the other."""
        positions, real_rows = self._share.positions(batch)
        bounds = self._plan.window_bounds(batch.epoch)
        first, last = np.searchsorted(bounds, positions[[0, -1]], side="right") - 1
        cuts = np.searchsorted(positions, bounds[first : last + 2])
        parts = [
            self._window(batch.epoch, int(first) + i).result().rows(self._source, positions[low:high])
            for i, (low, high) in enumerate(pairwise(cuts))
        ]
        arrays, row_ids = parts[0] if len(parts) == 1 else _joined(parts)
        if self._augment is not None:
            arrays = self._augment(arrays, batch.epoch, positions)
        weight = np.ones(len(positions), np.float32)
        if real_rows < len(positions):
            weight[real_rows:] = 0
            row_ids[real_rows:] = -1
        cursor = batch.epoch * self._plan.rows_per_epoch + batch.start
        return HostBatch(cursor, cursor + batch.rows, batch.epoch, batch.rows, arrays, weight, row_ids)

    def _window(self, epoch: int, number: int) -> Future[_Window]:
        """The window, with the one after it on its way and those before it forgotten."""
        last = number + 2 == len(self._plan.window_bounds(epoch))
        following = (epoch + 1, 0) if last else (epoch, number + 1)
        for key in ((epoch, number), following):
            if key not in self._windows and key[0] < self._epochs:
                self._windows[key] = self._preparer.submit(self._prepared, *key)
        for key in [key for key in self._windows if key < (epoch, number)]:
            del self._windows[key]
        return self._windows[epoch, number]

    def _prepared(self, epoch: int, number: int) -> _Window:
        low, high = self._plan.window_bounds(epoch)[number : number + 2]
        positions = self._share.in_window(epoch, int(low), int(high))
        places = positions - low
        window = self._plan.window(epoch, number)
        goes_to = np.full(len(window.order), -1, np.int64)
        goes_to[window.order[places]] = np.arange(len(places))
        row_ids = self._plan.window_row_ids(epoch, number)[places]
        return self._source.window(positions, row_ids, window, goes_to)


@dataclass(frozen=True)
class _Window:
    """The rows of one window that this worker uses, in the order in which it uses them."""

    positions: NDArray[np.int64]
    """Ascending."""
    row_ids: NDArray[np.int64]
    arrays: Arrays
    images: pa.Table
    """In the dataset's order: a copy of the files would cost more than it saves."""
    image_places: NDArray[np.int64]
    """Where in `images` each position's are."""

    def rows(self, source: _Source, positions: NDArray[np.int64]) -> tuple[Arrays, NDArray[np.int64]]:
        """Arrays, and row ids, of some ascending positions, the last of which may repeat.

        Positions that follow one another, as they do but for padding, are parts of the window's own
        memory: each row is used once, so nobody else is handed it.
        """
        first = int(np.searchsorted(self.positions, positions[0]))
        places: slice | NDArray[np.int64] = slice(first, first + len(positions))
        if positions[-1] - positions[0] != len(positions) - 1:
            places = np.searchsorted(self.positions, positions)
        row_ids = self.row_ids[places]
        arrays = {name: values[places] for name, values in self.arrays.items()}
        return source.decoded(self, places, row_ids) | arrays, row_ids


class _Source:
    """Reads and converts the columns that a task takes."""

    def __init__(
        self,
        dataset: Dataset,
        task: Task,
        readers: Executor,
        decoders: Executor,
        stopping: threading.Event,
        turn: float,
    ) -> None:
        signature = task.signature()
        self._dataset = dataset
        self._stopping = stopping
        self._turn = turn
        self._facts = task.facts
        self._readers = readers
        self._decoders = decoders
        self._images = [tensor for tensor in signature.inputs if tensor.encoding is not None]
        self._plain = [tensor for tensor in signature.inputs if tensor.encoding is None]
        self._vocabularies = task.vocabularies()
        self._columns = list(
            dict.fromkeys([*(tensor.name for tensor in signature.inputs), self._facts.label])
        )

    @property
    def is_plain(self) -> bool:
        """Whether nothing is left to do once a window is there."""
        return not self._images

    def window(
        self,
        positions: NDArray[np.int64],
        row_ids: NDArray[np.int64],
        window: PlanWindow,
        goes_to: NDArray[np.int64],
    ) -> _Window:
        """Each row group is read, converted and strewn over the window's arrays as a job of its own.

        Args:
            goes_to: for each row of the window's groups, laid end to end, its place in `positions`, or
                -1. So a group is gone through in its own order, and memory is jumped about in only
                where it is written.
        """
        like = self._converted(self._dataset.empty(self._columns), row_ids[:0])
        arrays = {name: np.empty((len(row_ids), *a.shape[1:]), a.dtype) for name, a in like.items()}

        def fill(job: tuple[int, int, int]) -> tuple[pa.Table, NDArray[np.int64]]:
            group, start, stop = job
            targets = goes_to[start:stop]
            used = np.flatnonzero(targets >= 0)
            if not len(used):
                return nothing, targets[:0]
            table = self._dataset.read_group(group, self._columns, given_up=self._stopping)
            if len(used) < len(targets):
                table, targets = table.take(pa.array(used)), targets[used]
            ids = used + self._dataset.row_groups[group].first_row
            written = slice(targets[0], targets[-1] + 1) if _ascend_by_one(targets) else targets
            for name, values in self._converted(table, ids).items():
                arrays[name][written] = values
            return table.select(nothing.column_names), targets

        nothing = self._dataset.empty([tensor.name for tensor in self._images])
        bounds = pairwise(window.starts.tolist())
        jobs = [(group, *bound) for group, bound in zip(window.groups.tolist(), bounds, strict=True)]
        # Each worker begins elsewhere, so that those of a machine find in its cache what another fetched.
        jobs = jobs[int(self._turn * len(jobs)) :] + jobs[: int(self._turn * len(jobs))]
        filled = list(self._readers.map(fill, jobs))
        images = pa.concat_tables([nothing, *(part for part, _ in filled)]).combine_chunks()
        image_places = np.empty(len(row_ids) if self._images else 0, np.int64)
        if self._images:
            order = np.concatenate([targets for _, targets in filled])
            image_places[order] = np.arange(len(order))
        return _Window(positions, row_ids, arrays, images, image_places)

    def _converted(self, table: pa.Table, row_ids: NDArray[np.int64]) -> Arrays:
        """All but the images, as the model takes them; not to be written to."""
        arrays: Arrays = {
            tensor.name: model_input(table, tensor, self._vocabularies.get(tensor.name), row_ids=row_ids)
            for tensor in self._plain
        }
        return arrays | {TARGET: target_array(table, self._facts, row_ids=row_ids)}

    def decoded(
        self, window: _Window, places: slice | NDArray[np.int64], row_ids: NDArray[np.int64]
    ) -> Arrays:
        """The images at some places of a window's positions."""
        if not self._images:
            return {}
        files = window.images.take(pa.array(window.image_places[places]))
        return {
            tensor.name: input_array(files, tensor, pool=self._decoders, row_ids=row_ids)
            for tensor in self._images
        }


def _joined(parts: list[tuple[Arrays, NDArray[np.int64]]]) -> tuple[Arrays, NDArray[np.int64]]:
    arrays = {name: np.concatenate([part[0][name] for part in parts]) for name in parts[0][0]}
    return arrays, np.concatenate([part[1] for part in parts])


def _ascend_by_one(numbers: NDArray[np.int64]) -> bool:
    return bool(numbers[-1] - numbers[0] == len(numbers) - 1 and (np.diff(numbers) == 1).all())


def _augments(task: Task) -> bool:
    return type(task).augment is not Task.augment


class _Augment:
    """Applies `task.augment` to each row with a generator of its own."""

    def __init__(self, task: Task, plan: Plan, pool: Executor) -> None:
        self._task = task
        self._pool = pool
        text = f"tandem augment 1\n{plan.seed}\n{plan.fingerprint}"
        self._key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype="<u8")

    def __call__(self, arrays: Arrays, epoch: int, positions: NDArray[np.int64]) -> Arrays:
        target = arrays.pop(TARGET)
        jobs = range(0, len(positions), _ROWS_PER_JOB)
        rows = [
            row
            for part in self._pool.map(lambda start: self._some(arrays, epoch, positions, start), jobs)
            for row in part
        ]
        changed: dict[str, NDArray[Any]] = {n: np.concatenate([row[n] for row in rows]) for n in arrays}
        return changed | {TARGET: target}

    def _some(
        self, arrays: Arrays, epoch: int, positions: NDArray[np.int64], start: int
    ) -> list[dict[str, NDArray[Any]]]:
        rows = []
        for place in range(start, min(start + _ROWS_PER_JOB, len(positions))):
            # The counter's low words are what drawing advances: rows can't run into one another.
            counter = np.array([0, 0, positions[place], epoch], dtype=np.uint64)
            rng = np.random.Generator(np.random.Philox(key=self._key, counter=counter))
            rows.append(self._task.augment({n: v[place : place + 1] for n, v in arrays.items()}, rng))
        return rows
