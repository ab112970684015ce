"""The order of samples: a pure function of (seed, epoch, dataset fingerprint), and nothing else.

An epoch's order is made in two steps. The dataset's row groups are shuffled; then, within each
window of consecutive shuffled groups, the rows are shuffled. So a reader that holds one window in
memory reads each group once an epoch, and any position is reached by working out one window.

How many workers there are is no part of it. The position in training is one integer, the
*cursor*: rows consumed since the start. A batch is the next `global_batch` rows of the order; it
never crosses an epoch's end, so an epoch's last batch may be smaller: nothing is dropped, nothing
padded. Each worker takes its slice of each batch (`rank_slice`).

The generator is frozen. Runs made by one release are resumed by the next, so the order may never
change: each shuffle sorts 64-bit words of Philox4x64-10 (a published function, whose raw stream
numpy promises to keep) under a key that is the head of a SHA-256. `Generator.permutation` is not
used, because numpy may change how it consumes the stream. A test holds golden values.

Knows nothing of files, tables or workers' processes.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

_K = TypeVar("_K")
_V = TypeVar("_V")
_CACHED_WINDOWS = 4
_CACHED_EPOCHS = 2


@dataclass(frozen=True, slots=True)
class BatchRange:
    """Positions [start, stop) of an epoch's order: one global batch."""

    epoch: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many rows the batch has, over all workers."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class PlanWindow:
    """Some row groups laid end to end, and the order in which their rows are used."""

    groups: NDArray[np.int64]
    """Numbers of the row groups, in the order in which they are laid."""
    starts: NDArray[np.int64]
    """Where each group begins in the row of groups, and the end of the last: int64 [groups + 1]."""
    order: NDArray[np.int64]
    """For each position of the window, the place of its row: a permutation. Not to be written to."""


def rank_slice(start: int, stop: int, rank: int, world: int) -> tuple[int, int]:
    """The part of positions [start, stop) that worker `rank` of `world` takes.

    The parts are contiguous, in order of rank, and differ in length by at most one; the first are
    the longer ones. With fewer rows than workers, some parts are empty.
    """
    assert 0 <= rank < world, (rank, world)
    share, rest = divmod(stop - start, world)
    first = start + rank * share + min(rank, rest)
    return first, first + share + (rank < rest)


class Plan:
    """The order of one dataset's samples. Immutable but for a small cache; safe to use from several threads.

    Args:
        seed: the run's seed, 0 to 2**63 - 1.
        fingerprint: the dataset's identity.
        group_rows: rows of each row group, in dataset order; at least one row in all.
        window_groups: how many shuffled groups are mixed with one another.
        shuffle: with False, every epoch is the dataset's own order.
    """

    def __init__(
        self,
        seed: int,
        fingerprint: str,
        group_rows: tuple[int, ...],
        window_groups: int = 8,
        shuffle: bool = True,
    ) -> None:
        assert window_groups >= 1, window_groups
        assert sum(group_rows) >= 1, "a plan needs rows"
        self.seed = seed
        self.fingerprint = fingerprint
        self.window_groups = window_groups
        self.shuffle = shuffle
        self._group_rows = np.asarray(group_rows, dtype=np.int64)
        self._rows = int(self._group_rows.sum())
        self._group_first = np.concatenate(([0], np.cumsum(self._group_rows)))[:-1]
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], PlanWindow] = OrderedDict()

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the dataset."""
        return self._rows

    def steps_per_epoch(self, global_batch: int) -> int:
        """Batches in an epoch, the smaller last one included."""
        return -(-self.rows_per_epoch // global_batch)

    def position(self, cursor: int, global_batch: int) -> int:
        """How many steps of `global_batch` rows lie before `cursor`; a part of a step counts as one."""
        epoch, start = divmod(cursor, self.rows_per_epoch)
        return epoch * self.steps_per_epoch(global_batch) + -(-start // global_batch)

    def batch(self, cursor: int, global_batch: int) -> BatchRange:
        """The batch that starts at `cursor`; the next cursor is `cursor + batch.rows`."""
        assert cursor >= 0, cursor
        assert global_batch >= 1, global_batch
        epoch, start = divmod(cursor, self.rows_per_epoch)
        return BatchRange(epoch, start, min(start + global_batch, self.rows_per_epoch))

    def row_ids(self, epoch: int, start: int, stop: int) -> NDArray[np.int64]:
        """Dataset rows at positions [start, stop) of the epoch's order: int64 [stop - start]."""
        assert 0 <= start <= stop <= self.rows_per_epoch, (start, stop)
        bounds = self.window_bounds(epoch)
        first, last = np.searchsorted(bounds, [start, stop - 1], side="right") - 1
        pieces = [
            self.window_row_ids(epoch, window)[max(0, start - bounds[window]) : stop - bounds[window]]
            for window in range(int(first), int(last) + 1 if stop > start else int(first))
        ]
        return np.concatenate(pieces) if pieces else np.empty(0, np.int64)

    def window_bounds(self, epoch: int) -> NDArray[np.int64]:
        """Where the epoch's windows begin, and the end of the last: int64 [windows + 1]."""
        return self._epoch(epoch).bounds

    def window(self, epoch: int, number: int) -> PlanWindow:
        """Window `number` of the epoch: which row groups it mixes, and how."""
        key = (epoch, number)
        window = self._windows.get(key)
        if window is None:
            groups = self._epoch(epoch).groups[number * self.window_groups :][: self.window_groups]
            starts = np.concatenate(([0], np.cumsum(self._group_rows[groups])))
            rows = int(starts[-1])
            order = self._permutation(f"epoch {epoch} window {number}", rows) if self.shuffle else None
            window = PlanWindow(groups, starts, np.arange(rows) if order is None else order)
            window.order.flags.writeable = False
            _keep(self._windows, key, window, _CACHED_WINDOWS)
        return window

    def window_row_ids(self, epoch: int, number: int) -> NDArray[np.int64]:
        """The dataset rows of a window, in the epoch's order."""
        window = self.window(epoch, number)
        extents = zip(self._group_first[window.groups], self._group_rows[window.groups], strict=True)
        return np.concatenate([np.arange(first, first + rows) for first, rows in extents])[window.order]

    def _epoch(self, epoch: int) -> _Epoch:
        known = self._epochs.get(epoch)
        if known is None:
            count = len(self._group_rows)
            groups = self._permutation(f"epoch {epoch} groups", count) if self.shuffle else np.arange(count)
            ends = np.cumsum(self._group_rows[groups])
            bounds = np.concatenate(([0], ends[self.window_groups - 1 : -1 : self.window_groups], ends[-1:]))
            known = _Epoch(groups, bounds)
            _keep(self._epochs, epoch, known, _CACHED_EPOCHS)
        return known

    def _permutation(self, of: str, length: int) -> NDArray[np.int64]:
        """A permutation of range(length), fixed by the seed, the fingerprint and `of` alone."""
        text = f"tandem plan 1\n{self.seed}\n{self.fingerprint}\n{of}"
        key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype="<u8")
        words = np.random.Philox(key=key).random_raw(length)
        # The index stands in the low bits: words that tie cannot make the order depend on numpy's
        # choice of sorting algorithm, and sorting plain integers is much faster than an argsort.
        index_mask = np.uint64((1 << length.bit_length()) - 1)
        words = (words & ~index_mask) | np.arange(length, dtype=np.uint64)
        words.sort()
        return (words & index_mask).astype(np.int64)


@dataclass(frozen=True, slots=True)
class _Epoch:
    groups: NDArray[np.int64]
    bounds: NDArray[np.int64]


def _keep(cache: OrderedDict[_K, _V], key: _K, value: _V, size: int) -> None:
    cache[key] = value
    while len(cache) > size:
        cache.popitem(last=False)
