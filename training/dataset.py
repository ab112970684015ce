"""A folder of Parquet files as one numbered sequence of rows.

Files are sorted by relative path; names that begin with '.' or '_' are passed over, at any depth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from training.facts import DatasetFacts
from training.plan import Plan


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One row group: `group` of file number `file`, whose first row is dataset row `first_row`."""

    file: int
    group: int
    first_row: int
    rows: int


class Dataset:
    """Parquet files as one sequence of rows, numbered from 0. Safe to use from several threads."""

    uri: str
    fingerprint: str
    rows: int
    row_groups: tuple[RowGroup, ...]
    schema: Any  # pyarrow.Schema

    @classmethod
    def open(cls, uri: str) -> Dataset:
        """Read the footers of every file below `uri`, or of the one file that it names.

        Raises:
            BadInput: no files, no rows, unlike schemas, or a column of a type that isn't taken.
            NotFound: there is nothing at `uri`.
            StorageError: the store can't be read.
        """
        raise NotImplementedError

    def read_rows(self, row_ids: NDArray[np.int64], columns: list[str]) -> pa.Table:
        """The given rows in the given order; an id may come more than once."""
        raise NotImplementedError

    def read_group(self, index: int, columns: list[str]) -> pa.Table:
        """The whole of row group `index`."""
        raise NotImplementedError

    def facts(self, label: str) -> DatasetFacts:
        """What training needs to know of the columns: stored facts if they are this dataset's, or a scan.

        Raises:
            BadInput: no such label column, or a column that no task can use.
        """
        raise NotImplementedError

    def plan(self, seed: int, *, shuffle: bool = True) -> Plan:
        """The order of samples, with a shuffle window sized from the dataset (about 64 MiB)."""
        raise NotImplementedError
