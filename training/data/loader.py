"""From Parquet to one worker's batches of arrays, along a plan, from a cursor, read ahead.

A window of the plan is read at once (`training.data.window`), and of it only the rows that this worker
uses are kept: each row group is read once an epoch, however small the batches are. A batch is a part of
a window; images are decoded a batch at a time.

Threads: the window after the current is prepared meanwhile (`training.data.ahead`); row groups are read,
and images decoded, in a small pool each. Where there are images, one thread begins batches in order, so
that several are being decoded, and one finishes them; other batches are made where they are asked for.
None of these has a say in what a batch holds.

Knows nothing of torch's devices or process groups, nor of checkpoints.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from training.data.ahead import WindowsAhead
from training.data.augmentation import Augmentation
from training.data.converter import Converter
from training.data.dataset import Dataset
from training.data.pixels import Pixels
from training.data.plan import BatchRange, Plan
from training.data.share import Share
from training.data.window import Window, WindowReader
from training.task import Arrays, Task

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
        rows = (epochs * plan.rows_per_epoch - cursor) // world_size
        converter = Converter(dataset, task)
        self._stopping = threading.Event()
        self._readers = ThreadPoolExecutor(readers, "tandem-read")
        reader = WindowReader(dataset, converter, self._readers, self._stopping, rank / world_size)
        self._windows = WindowsAhead(plan, self._share, epochs, reader)
        self._pixels = Pixels(converter, dataset.mean_row_bytes, rows, threads)
        self._augment = Augmentation(task, plan, self._pixels.pool) if task.augments else None
        self._beginner = ThreadPoolExecutor(1, "tandem-batches")
        self._finisher = ThreadPoolExecutor(1, "tandem-finish")
        # A batch that is parts of a window takes less time to make than to hand to another thread.
        self._cuts_only = not converter.images and self._augment is None
        self._ready: deque[Future[HostBatch]] = deque()
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
        pools = self._beginner, self._finisher, self._readers
        # All are told before one is waited for: they wait for one another.
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
        self._windows.stop()
        self._pixels.stop()
        for pool in pools:
            pool.shutdown(wait=True)
        self._windows.close()
        self._pixels.close()

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
            if not self._ended:
                self._windows.begin(*divmod(self._next_cursor, self._plan.rows_per_epoch))
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
            self._rows(self._windows.window(batch.epoch, int(first) + i), positions[low:high])
            for i, (low, high) in enumerate(pairwise(cuts))
        ]
        arrays, row_ids, jobs = parts[0] if len(parts) == 1 else self._joined(parts)
        weight = np.ones(len(positions), np.float32)
        if real_rows < len(positions):
            weight[real_rows:] = 0
            row_ids[real_rows:] = -1
        cursor = batch.epoch * self._plan.rows_per_epoch + batch.start
        made = HostBatch(cursor, cursor + batch.rows, batch.epoch, batch.rows, arrays, weight, row_ids)
        return _Begun(made, positions, jobs)

    def _rows(self, window: Window, positions: NDArray[np.int64]) -> _Rows:
        places = window.places(positions)
        row_ids = window.row_ids[places]
        arrays = {name: values[places] for name, values in window.arrays.items()}
        if not window.images.num_columns:
            return arrays, row_ids, []
        # A copy of the numbers: the batch's own may be marked as padding while images are decoded.
        pixels, jobs = self._pixels.begun(window.files(places), row_ids.copy())
        return pixels | arrays, row_ids, jobs

    def _joined(self, parts: list[_Rows]) -> _Rows:
        """Rows of several windows; images are waited for, as they are copied."""
        self._pixels.finished([job for _, _, jobs in parts for job in jobs])
        arrays = {name: np.concatenate([part[0][name] for part in parts]) for name in parts[0][0]}
        return arrays, np.concatenate([part[1] for part in parts]), []

    def _finished_when_begun(self, begun: Future[_Begun]) -> HostBatch:
        return self._finished(begun.result())

    def _finished(self, begun: _Begun) -> HostBatch:
        batch = begun.batch
        self._pixels.finished(begun.jobs)
        if self._augment is None:
            return batch
        return replace(batch, arrays=self._augment(batch.arrays, batch.epoch, begun.positions))


_Rows = tuple[Arrays, NDArray[np.int64], list[Future[None]]]
"""Arrays, row ids, and the jobs that fill the images in."""


@dataclass(frozen=True)
class _Begun:
    """A batch whose images may still be on their way."""

    batch: HostBatch
    positions: NDArray[np.int64]
    jobs: Sequence[Future[None]]
    """All images are there when these are done."""
