"""Which rows are held out for evaluation, and the order in which the others are written.

A pure function of the labels and a seed. Each class gives its share, and keeps at least one row for
training, since a class that training has never seen can't be evaluated. Rows are written in random
order, so that files sorted by class still train well with a shuffle window smaller than the dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import BadInput, shown

RowIds = NDArray[np.int64]


def split_rows(classes: NDArray[Any] | Sequence[str], fraction: float, seed: int) -> tuple[RowIds, RowIds]:
    """Rows for training and rows for evaluation, each int64 and in random order.

    Args:
        classes: the class of each row, [rows]; all alike for a regression.
        fraction: of the rows of each class that are held out, rounded.

    Raises:
        BadInput: the fraction isn't between 0 and 1, or too few rows to hold any out.
    """
    if not 0 < fraction < 1:
        raise BadInput(
            "the evaluation fraction can't be used",
            got=shown(fraction),
            allowed="more than 0 and less than 1",
            fix="use 0.2 to hold out a fifth of the rows",
        )
    keys = np.random.default_rng(seed).random(len(classes))
    _, codes, counts = np.unique(np.asarray(classes), return_inverse=True, return_counts=True)
    held_out_of_class = np.minimum(np.floor(counts * fraction + 0.5).astype(np.int64), counts - 1)
    by_class = np.lexsort((keys, codes))
    first_of_class = np.concatenate(([0], np.cumsum(counts)))[:-1]
    place_in_class = np.arange(len(keys)) - first_of_class[codes[by_class]]
    held_out = np.zeros(len(keys), bool)
    held_out[by_class] = place_in_class < held_out_of_class[codes[by_class]]
    if not held_out.any():
        raise BadInput(
            "there are too few rows to hold any out for evaluation",
            got=f"{len(keys)} rows of {len(counts)} classes",
            allowed=f"a class of at least 2 rows of which {fraction:g} is a row or more",
            fix="add rows, or raise the evaluation fraction",
        )
    order = np.argsort(keys)
    return order[~held_out[order]], order[held_out[order]]
