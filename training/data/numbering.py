"""Which row of a dataset is where: row groups in a fixed order, rows numbered through.

Files stand in order of their relative path, row groups in order within a file; row 0 is the first
row of the first. Groups without rows are passed over. Pure; knows nothing of how rows are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.data.footers import DataFile


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One row group that has rows: number `group` of file number `file`.

    `first_row` is the dataset's number of its first row; `size_bytes` is its size before compression.
    """

    file: int
    group: int
    first_row: int
    rows: int
    size_bytes: int


def row_groups_of(files: Sequence[DataFile]) -> tuple[RowGroup, ...]:
    """The row groups of some files."""
    groups: list[RowGroup] = []
    first_row = 0
    for number, file in enumerate(files):
        for index in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(index)
            if group.num_rows:
                groups.append(RowGroup(number, index, first_row, group.num_rows, group.total_byte_size))
                first_row += group.num_rows
    return tuple(groups)


class Numbering:
    """Finds rows in row groups that stand end to end."""

    def __init__(self, row_groups: Sequence[RowGroup]) -> None:
        self.first_rows = np.asarray([group.first_row for group in row_groups], dtype=np.int64)

    def by_group(self, row_ids: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
        """Which row groups hold the rows: (index of the group, ascending places in `row_ids`) of each."""
        groups = np.searchsorted(self.first_rows, row_ids, side="right") - 1
        counts = np.bincount(groups, minlength=len(self.first_rows))
        touched = np.flatnonzero(counts)
        # numpy sorts 16-bit integers by radix, several times as fast as wider ones.
        order = np.argsort(groups.astype(np.uint16) if len(counts) < 2**16 else groups, kind="stable")
        parts = np.split(order, np.cumsum(counts[touched])[:-1]) if len(touched) else []
        return list(zip(touched.tolist(), parts, strict=True))

    def group_of(self, row_id: int) -> int:
        """The index of the group that holds a row."""
        return int(np.searchsorted(self.first_rows, row_id, side="right")) - 1
