"""Parquet row groups to batches of arrays, along a plan, from a cursor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from training.dataset import Dataset
from training.plan import Plan
from training.task import Arrays, Task


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
    """Iterates one worker's batches from `cursor` to `end_cursor`. Close it, or use it in a `with`.

    Every worker gets the same number of batches with the same number of rows,
    ceil(global rows / world_size): a worker whose slice is shorter is given a repeated row of weight 0.
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
        end_cursor: int,
        prefetch_batches: int = 2,
        threads: int = 2,
    ) -> None:
        raise NotImplementedError

    def __iter__(self) -> Iterator[HostBatch]:
        return self

    def __next__(self) -> HostBatch:
        """The next batch.

        Raises:
            BadInput: a value that the signature doesn't take.
            StorageError: the dataset can't be read.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Stop reading ahead and end the threads. May be called twice."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
