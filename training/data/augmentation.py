"""Applies a task's augmentation to a batch, each row with a generator of its own.

A row's generator is a function of (seed, dataset, epoch, position), so its outcome depends neither on
the workers nor on the batches. Like the order of samples, it may never change between releases.

Knows nothing of files or of what an augmentation does.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Executor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.data.plan import Plan
from training.task import TARGET, Arrays, Task

_ROWS_PER_JOB = 32


class Augmentation:
    """Calls `task.augment` with one row at a time, some rows a job of `pool`."""

    def __init__(self, task: Task, plan: Plan, pool: Executor) -> None:
        self._task = task
        self._pool = pool
        text = f"tandem augment 1\n{plan.seed}\n{plan.fingerprint}"
        self._key = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype="<u8")

    def __call__(self, arrays: Arrays, epoch: int, positions: NDArray[np.int64]) -> Arrays:
        """The batch augmented, its target as it was.

        Args:
            positions: int64 [B], of the rows in the epoch's order.
        """
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
