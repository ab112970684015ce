"""One worker's share of a plan: which positions of each batch, and of each window, are its own.

Collectives need every worker to take every step with a batch of the same size. So each gets
ceil(rows / world) positions of a batch; where its slice is shorter, its last position is repeated
as padding (of weight 0), and where its slice is empty, the batch's first position stands in.

Knows nothing of files or arrays.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.data.plan import BatchRange, Plan, rank_slice


@dataclass(frozen=True)
class Share:
    """Worker `rank` of `world`, from `cursor` on, in steps of `global_batch` rows."""

    plan: Plan
    global_batch: int
    rank: int
    world: int
    cursor: int

    def positions(self, batch: BatchRange) -> tuple[NDArray[np.int64], int]:
        """The worker's positions in the epoch's order, ascending, and how many of them aren't padding.

        Returns:
            int64 [ceil(batch.rows / world)], and the number of real ones, which come first.
        """
        start, stop = rank_slice(batch.start, batch.stop, self.rank, self.world)
        local_rows = -(-batch.rows // self.world)
        filler = stop - 1 if stop > start else batch.start
        padding = np.full(local_rows - (stop - start), filler, np.int64)
        return np.concatenate((np.arange(start, stop, dtype=np.int64), padding)), stop - start

    def in_window(self, epoch: int, low: int, high: int) -> NDArray[np.int64]:
        """The positions in [low, high) that the worker's batches of this epoch use: int64, ascending."""
        rows = self.plan.rows_per_epoch
        first_epoch, origin = divmod(self.cursor, rows)
        if epoch != first_epoch:
            origin = 0
        first = origin + max(0, low - origin) // self.global_batch * self.global_batch
        starts = np.arange(first, min(high, rows), self.global_batch, dtype=np.int64)
        begins, counts = self._slices(starts, np.minimum(starts + self.global_batch, rows))
        ends = np.cumsum(counts)
        every = np.arange(counts.sum(), dtype=np.int64) + np.repeat(begins - (ends - counts), counts)
        inside: NDArray[np.int64] = every[(every >= low) & (every < high)]
        return inside

    def _slices(
        self, starts: NDArray[np.int64], stops: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Of many batches at once: where the worker's slice begins, and how many positions it uses."""
        # The arithmetic of `rank_slice`; a test holds the two together.
        share, rest = np.divmod(stops - starts, self.world)
        counts = share + (self.rank < rest)
        begins = starts + self.rank * share + np.minimum(self.rank, rest)
        # Where the slice is empty, the batch's first position stands in.
        return np.where(counts > 0, begins, starts), np.maximum(counts, 1)
