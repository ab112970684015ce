"""From Parquet to one worker's batches of arrays, along a plan, from a cursor, read ahead.

A window of the plan is read at once, and of it only the rows that this worker uses are kept: each
row group is read once an epoch, however small the batches are. Numbers and words are converted a row
group at a time and strewn over the window's arrays in the order of use, so that a batch is a part of
each array, not a copy; images are decoded a batch at a time, since decoded they take far more memory
than as files.

Threads: one prepares the window after the current, for which another has worked out the order; row
groups are read, and images decoded, in a small pool each. Where there are images, one more begins
batches in order, so that several are being decoded, and one more finishes them; other batches are made
where they are asked for. Many small images are decoded by processes (`training.data.decoding`). None of
these has a say in what a batch holds.

Tried and left out: one matrix of all columns whose rows are gathered and then turned to columns; its
three passes take what the one pass here takes.

Knows nothing of torch's devices or process groups, nor of checkpoints.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.errors import BadInput
from training.data.columns import (
    IMAGES_PER_JOB,
    SMALL_IMAGE_BYTES,
    BadRow,
    images_begun,
    model_input,
    target_array,
)
from training.data.dataset import Dataset
from training.data.decoding import Decoders, decode_here
from training.data.plan import BatchRange, Plan, PlanWindow
from training.data.share import Share
from training.task import TARGET, Arrays, Task

_ROWS_PER_JOB = 32
_THREADS = (2, 8)
_MOST_DECODERS = 4
_DECODERS_PAY_FROM_ROWS = 20_000
"""A process takes as long to start as it does to decode some thousands of small images."""
_SMALL_IMAGES_PER_JOB = 64
_PLANNED_AHEAD = 2


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
        of_images = any(tensor.encoding for tensor in task.signature().inputs)
        rows = (epochs * plan.rows_per_epoch - cursor) // world_size
        processes = 0
        if of_images and dataset.mean_row_bytes < SMALL_IMAGE_BYTES and rows >= _DECODERS_PAY_FROM_ROWS:
            processes = min(threads, _MOST_DECODERS)
        self._processes = Decoders(processes) if processes else None
        self._beginner = ThreadPoolExecutor(1, "tandem-batches")
        self._finisher = ThreadPoolExecutor(1, "tandem-finish")
        self._planner = ThreadPoolExecutor(1, "tandem-plan")
        self._preparer = ThreadPoolExecutor(1, "tandem-window")
        self._readers = ThreadPoolExecutor(readers, "tandem-read")
        self._decoders = ThreadPoolExecutor(processes or threads, "tandem-decode")
        self._stopping = threading.Event()
        self._source = _Source(
            dataset, task, self._readers, self._decoders, self._processes, self._stopping, rank / world_size
        )
        self._augment = _Augment(task, plan, self._decoders) if task.augments else None
        # A batch that is parts of a window takes less time to make than to hand to another thread.
        self._cuts_only = self._source.is_plain and self._augment is None
        self._ready: deque[Future[HostBatch]] = deque()
        self._orders: dict[tuple[int, int], Future[_Order]] = {}
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
                batch = self._finished(self._begun(self._taken()))
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
        pools = (
            self._beginner,
            self._finisher,
            self._planner,
            self._preparer,
            self._readers,
            self._decoders,
        )
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in pools:
            pool.shutdown(wait=True)
        if self._processes is not None:
            self._processes.close()
        self._orders.clear()
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
            begun = self._beginner.submit(self._begun, self._taken())
            self._ready.append(self._finisher.submit(self._finished_when_begun, begun))

    def _taken(self) -> BatchRange:
        if self._ended:
            raise StopIteration
        batch = self._plan.batch(self._next_cursor, self._share.global_batch)
        self._next_cursor += batch.rows
        return batch

    def _begun(self, batch: BatchRange) -> _Begun:
        """The batch, its images being decoded; called for one after the other."""
        positions, real_rows = self._share.positions(batch)
        bounds = self._plan.window_bounds(batch.epoch)
        first, last = np.searchsorted(bounds, positions[[0, -1]], side="right") - 1
        cuts = np.searchsorted(positions, bounds[first : last + 2])
        parts = [
            self._window(batch.epoch, int(first) + i).result().rows(self._source, positions[low:high])
            for i, (low, high) in enumerate(pairwise(cuts))
        ]
        arrays, row_ids, jobs = parts[0] if len(parts) == 1 else _joined(self._source, parts)
        weight = np.ones(len(positions), np.float32)
        if real_rows < len(positions):
            weight[real_rows:] = 0
            row_ids[real_rows:] = -1
        cursor = batch.epoch * self._plan.rows_per_epoch + batch.start
        made = HostBatch(cursor, cursor + batch.rows, batch.epoch, batch.rows, arrays, weight, row_ids)
        return _Begun(made, positions, jobs)

    def _finished_when_begun(self, begun: Future[_Begun]) -> HostBatch:
        return self._finished(begun.result())

    def _finished(self, begun: _Begun) -> HostBatch:
        batch = begun.batch
        self._source.finished(begun.jobs)
        if self._augment is None:
            return batch
        return replace(batch, arrays=self._augment(batch.arrays, batch.epoch, begun.positions))

    def _window(self, epoch: int, number: int) -> Future[_Window]:
        """The window; the one after it on its way, the next one's order too, those before forgotten."""
        keys = [(epoch, number)]
        for _ in range(_PLANNED_AHEAD):
            keys.append(self._following(*keys[-1]))
        for key in keys:
            if key not in self._orders and key[0] < self._epochs:
                self._orders[key] = self._planner.submit(self._ordered, *key)
        for key in keys[:2]:
            if key not in self._windows and key[0] < self._epochs:
                self._windows[key] = self._preparer.submit(self._prepared, self._orders[key])
        self._windows = {key: window for key, window in self._windows.items() if key >= keys[0]}
        self._orders = {key: order for key, order in self._orders.items() if key >= keys[0]}
        return self._windows[epoch, number]

    def _following(self, epoch: int, number: int) -> tuple[int, int]:
        last = number + 2 == len(self._plan.window_bounds(epoch))
        return (epoch + 1, 0) if last else (epoch, number + 1)

    def _ordered(self, epoch: int, number: int) -> _Order:
        low, high = self._plan.window_bounds(epoch)[number : number + 2]
        positions = self._share.in_window(epoch, int(low), int(high))
        places = positions - low
        window = self._plan.window(epoch, number)
        goes_to = np.full(len(window.order), -1, np.int64)
        goes_to[window.order[places]] = np.arange(len(places))
        row_ids = self._plan.window_row_ids(epoch, number)[places]
        return _Order(positions, row_ids, window, goes_to)

    def _prepared(self, order: Future[_Order]) -> _Window:
        return self._source.window(order.result())


@dataclass(frozen=True)
class _Begun:
    """A batch whose images may still be on their way."""

    batch: HostBatch
    positions: NDArray[np.int64]
    jobs: Sequence[Future[None]]
    """All images are there when these are done."""


@dataclass(frozen=True)
class _Order:
    """Which rows of one window this worker uses, and when."""

    positions: NDArray[np.int64]
    """Ascending."""
    row_ids: NDArray[np.int64]
    window: PlanWindow
    goes_to: NDArray[np.int64]
    """For each row of the window's groups, laid end to end, its place in `positions`, or -1. So a group
    is gone through in its own order, and memory is jumped about in only where it is written."""


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

    def rows(self, source: _Source, positions: NDArray[np.int64]) -> _Rows:
        """Arrays, row ids and jobs of some ascending positions, the last of which may repeat.

        Positions that follow one another, as they do but for padding, are parts of the window's own
        memory: each row is used once, so nobody else is handed it.
        """
        first = int(np.searchsorted(self.positions, positions[0]))
        places: slice | NDArray[np.int64] = slice(first, first + len(positions))
        if positions[-1] - positions[0] != len(positions) - 1:
            places = np.searchsorted(self.positions, positions)
        row_ids = self.row_ids[places]
        arrays = {name: values[places] for name, values in self.arrays.items()}
        pixels, jobs = source.being_decoded(self, places, row_ids)
        return pixels | arrays, row_ids, jobs


class _Source:
    """Reads and converts the columns that a task takes."""

    def __init__(
        self,
        dataset: Dataset,
        task: Task,
        readers: Executor,
        decoders: Executor,
        processes: Decoders | None,
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
        self._decode = decode_here if processes is None else processes.decode
        self._images_per_job = IMAGES_PER_JOB if processes is None else _SMALL_IMAGES_PER_JOB
        if processes is None and dataset.mean_row_bytes < SMALL_IMAGE_BYTES:
            self._images_per_job = dataset.rows
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

    def window(self, order: _Order) -> _Window:
        """Each row group is read, converted and strewn over the window's arrays as a job of its own."""
        row_ids, window, goes_to = order.row_ids, order.window, order.goes_to
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
            laid = np.concatenate([targets for _, targets in filled])
            image_places[laid] = np.arange(len(laid))
        return _Window(order.positions, row_ids, arrays, images, image_places)

    def _converted(self, table: pa.Table, row_ids: NDArray[np.int64]) -> Arrays:
        """All but the images, as the model takes them; not to be written to."""
        try:
            arrays: Arrays = {
                tensor.name: model_input(table, tensor, self._vocabularies.get(tensor.name), row_ids=row_ids)
                for tensor in self._plain
            }
            return arrays | {TARGET: target_array(table, self._facts, row_ids=row_ids)}
        except BadRow as error:
            raise self._placed(error) from None

    def being_decoded(
        self, window: _Window, places: slice | NDArray[np.int64], row_ids: NDArray[np.int64]
    ) -> tuple[Arrays, list[Future[None]]]:
        """The images at some places of a window's positions, and the jobs that fill them in."""
        arrays: Arrays = {}
        jobs: list[Future[None]] = []
        if self._images:
            files = window.images.take(pa.array(window.image_places[places]))
        for tensor in self._images:
            arrays[tensor.name], begun = images_begun(
                files,
                tensor,
                self._decoders,
                decode=self._decode,
                images_per_job=self._images_per_job,
                row_ids=row_ids.copy(),  # the batch's own may be marked as padding meanwhile
            )
            jobs += begun
        return arrays, jobs

    def finished(self, jobs: Sequence[Future[None]]) -> None:
        """Wait for jobs.

        Raises:
            BadInput: a row that can't be used; names dataset, file, row group and row.
        """
        try:
            for job in jobs:
                job.result()
        except BadRow as error:
            raise self._placed(error) from None

    def _placed(self, error: BadRow) -> BadInput:
        return BadInput(
            f"{error.failed} ({self._dataset.place_of(error.row)})",
            got=error.got,
            allowed=error.allowed,
            fix=error.fix,
        )


_Rows = tuple[Arrays, NDArray[np.int64], list[Future[None]]]
"""Arrays, row ids, and the jobs that fill the images in."""


def _joined(source: _Source, parts: list[_Rows]) -> _Rows:
    """Rows of several windows; images are waited for, as they are copied."""
    source.finished([job for _, _, jobs in parts for job in jobs])
    arrays = {name: np.concatenate([part[0][name] for part in parts]) for name in parts[0][0]}
    return arrays, np.concatenate([part[1] for part in parts]), []


def _ascend_by_one(numbers: NDArray[np.int64]) -> bool:
    return bool(numbers[-1] - numbers[0] == len(numbers) - 1 and (np.diff(numbers) == 1).all())


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
        bits = np.random.Philox(key=self._key)
        rng = np.random.Generator(bits)
        unused = bits.state
        for place in range(start, min(start + _ROWS_PER_JOB, len(positions))):
            # The counter's low words are what drawing advances: rows can't run into one another.
            counter = np.array([0, 0, positions[place], epoch], dtype=np.uint64)
            # A generator made anew for each row would take longer than most augmentations.
            bits.state = {**unused, "state": {"counter": counter, "key": self._key}}
            rows.append(self._task.augment({n: v[place : place + 1] for n, v in arrays.items()}, rng))
        return rows
