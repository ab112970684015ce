"""A table's columns and rows as errors name them: what is missing, and what is wrong with which row.

Knows nothing of what a column is for.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import types as pat

from cluster.errors import BadInput

RowIds = NDArray[np.int64]


class BadRow(BadInput):
    """What is wrong with one row. `row`: its number, as the caller numbers rows."""

    def __init__(self, failed: str, row: int = 0, **parts: str) -> None:
        super().__init__(failed, **parts)
        self.row = row


def column_of(table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column by its name. Raises: BadInput where there is none."""
    if name not in table.column_names:
        raise BadInput(
            f"the data has no column '{name}'",
            got="columns " + ", ".join(table.column_names),
            allowed="every input of the model, and the label",
            fix=f"add '{name}' to the data",
        )
    return table.column(name)


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type holds bytes that are no text."""
    return bool(pat.is_binary(kind) or pat.is_large_binary(kind))


def row_number(place: int, row_ids: RowIds | None) -> int:
    """How errors name the row at `place`."""
    return int(place if row_ids is None else row_ids[place])
