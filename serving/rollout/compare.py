"""How many rows two versions answered otherwise.

A row agrees where the answer that a caller would act on is the same: for a classifier's scores the class
that scores highest, for texts and whole numbers the value itself, for other numbers the value to within one
percent, since two trainings of one model never agree to the last bit. Pure.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.signature import Signature

Arrays = dict[str, NDArray[Any]]
_RELATIVE = 0.01
_ABSOLUTE = 1e-3


def rows_that_differ(signature: Signature, ours: Arrays, theirs: Arrays) -> int:
    """Rows, of axis 0, in which any output says something else.

    Args:
        signature: of the version in service; with `labels`, outputs as wide as these are scores.
        ours: outputs of the version in service.
        theirs: the candidate's, for the same rows. An output that is missing, or has another shape,
            differs in every row.
    """
    rows = len(next(iter(ours.values())))
    differs = np.zeros(rows, dtype=bool)
    classes = len(signature.labels) if signature.labels else None
    for name, value in ours.items():
        other = theirs.get(name)
        if other is None or other.shape != value.shape:
            return rows
        differs |= _differs(value, other, classes).reshape(rows, -1).any(axis=1)
    return int(differs.sum())


def _differs(value: NDArray[Any], other: NDArray[Any], classes: int | None) -> NDArray[np.bool_]:
    if value.dtype.kind != "f":
        return np.asarray(value != other)
    if value.ndim == 2 and value.shape[1] == classes:
        return np.asarray(value.argmax(axis=1) != other.argmax(axis=1))
    return np.asarray(~np.isclose(value, other, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True))
