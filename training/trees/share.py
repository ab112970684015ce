"""One worker's share of a dataset's rows, as XGBoost takes it: read a row group at a time, sorted into bins.

Rank r of n has the r-th of n equal runs of rows, so shares are disjoint, together the whole dataset, and the
same for every process that has that rank. Only the row groups that a share touches are read; the two at its
ends may be touched by its neighbours too. The bins come from a sketch of all shares, which the ranks exchange
while the matrix is made.

What a share takes in memory is a byte or two for each value. A share that takes more than a worker may have
lies in files of its own, and is read from there in every round (`xgboost.ExtMemQuantileDMatrix`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xgboost as xgb
from numpy.typing import NDArray

from training.data.converter import Converter
from training.data.dataset import Dataset
from training.data.plan import rank_slice
from training.problem import TARGET
from training.tasks.trees import BoostedTrees
from training.trees.scratch import Scratch

_BATCH_BYTES = 64 * 1024 * 1024
"""Values that are handed over at once, as float32."""


@dataclass(frozen=True, slots=True)
class Shares:
    """What a worker grows trees on, and what it holds back."""

    train: xgb.DMatrix
    held_back: xgb.DMatrix | None


def read_share(
    dataset: Dataset, trees: BoostedTrees, *, rank: int, world: int, seed: int, threads: int
) -> Shares:
    """Read one rank's rows; every rank of the group does so at once.

    Args:
        seed: chooses the rows that are held back.

    Raises:
        BadInput: a row can't be used; names it.
        StorageError: the data can't be read.
        XGBoostError: a peer is gone.
    """
    options = trees.options
    start, stop = rank_slice(0, dataset.rows, rank, world)
    rows = _Rows(dataset, trees, start, stop, seed)
    bytes_each = 1 if options.bins <= 256 else 2
    is_large = (stop - start) * len(trees.columns) * bytes_each > options.memory_gib * 2**30

    def matrix(held_back: bool, ref: xgb.DMatrix | None) -> xgb.DMatrix:
        scratch = Scratch() if is_large else None
        place = scratch.path if scratch else None
        batches = _Batches(lambda: rows.batches(held_back=held_back), rows.kinds, place)
        kind = xgb.ExtMemQuantileDMatrix if is_large else xgb.QuantileDMatrix
        made = kind(batches, max_bin=options.bins, ref=ref, nthread=threads, enable_categorical=True)
        if scratch is not None:
            scratch.remove_with(made)
        return made

    train = matrix(False, None)
    return Shares(train, matrix(True, train) if options.early_stopping else None)


def is_held_back(row_ids: NDArray[np.int64], share: float, seed: int) -> NDArray[np.bool_]:
    """Whether rows are kept from training: a function of the row's number alone, whoever reads it."""
    mixed = row_ids.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15) % 2**64)
    # The finaliser of splitmix64 (Steele, Lea and Flood 2014).
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)).astype(np.float64) / 2**53 < share


class _Rows:
    """Rows [start, stop) of a dataset, as XGBoost's features."""

    def __init__(self, dataset: Dataset, trees: BoostedTrees, start: int, stop: int, seed: int) -> None:
        self.kinds = ["q" if column.kind == "number" else "c" for column in trees.columns.values()]
        self._dataset = dataset
        self._converter = Converter(dataset, trees)
        self._names = trees.input_names
        self._start, self._stop = start, stop
        self._seed = seed
        stopping = trees.options.early_stopping
        self._share = stopping.share if stopping else 0.0

    def batches(self, *, held_back: bool) -> Iterator[tuple[NDArray[np.float32], NDArray[Any]]]:
        """features_RF, categories by their codes, and the target [R]; always one batch at least."""
        size = max(1, _BATCH_BYTES // (4 * max(1, len(self._names))))
        given = False
        for group in self._dataset.row_groups:
            low, high = max(self._start, group.first_row), min(self._stop, group.first_row + group.rows)
            for first in range(low, high, size):
                features, target = self._read(first, min(first + size, high), held_back=held_back)
                if len(target):
                    given = True
                    yield features, target
        if not given:  # a rank may have no rows, and takes part all the same
            yield self._read(0, 0, held_back=held_back)

    def _read(self, start: int, stop: int, *, held_back: bool) -> tuple[NDArray[np.float32], NDArray[Any]]:
        row_ids = np.arange(start, stop, dtype=np.int64)
        if self._share:
            row_ids = row_ids[is_held_back(row_ids, self._share, self._seed) == held_back]
        table = self._dataset.read_rows(row_ids, self._converter.columns)
        arrays = self._converter.plain(table, row_ids)
        features_RF = np.empty((len(row_ids), len(self._names)), np.float32)
        for place, (name, kind) in enumerate(zip(self._names, self.kinds, strict=True)):
            features_RF[:, place] = arrays[name]
            if kind == "c":  # 0 is missing or never seen, and i + 1 is word i
                codes = features_RF[:, place]
                codes -= 1
                codes[codes < 0] = np.nan
        return features_RF, arrays[TARGET]


class _Batches(xgb.DataIter):  # type: ignore[misc] # its types are not followed
    """Hands batches to XGBoost, which goes through them more than once."""

    def __init__(
        self,
        begin: Callable[[], Iterator[tuple[NDArray[np.float32], NDArray[Any]]]],
        kinds: list[str],
        folder: Path | None,
    ) -> None:
        self._begin = begin
        self._kinds = kinds
        self._batches = begin()
        super().__init__(cache_prefix=str(folder / "rows") if folder else None, on_host=folder is None)

    def reset(self) -> None:
        self._batches = self._begin()

    def next(self, input_data: Any) -> bool:
        found = next(self._batches, None)
        if found is None:
            return False
        input_data(data=found[0], label=found[1], feature_types=self._kinds)
        return True
