"""What is known of a dataset before training: its identity, its columns, their statistics.

Computed once by the driver and recorded in the run, so that every worker and every later attempt
builds the same model. `tandem data import` stores them beside the Parquet files.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cluster.config import Frozen
from cluster.signature import ImageEncoding

ColumnKind = Literal["number", "category", "image", "audio", "text"]


class ColumnFacts(Frozen):
    """One column. Which fields are set depends on `kind`."""

    kind: ColumnKind
    missing_rows: int = Field(0, ge=0)
    mean: float | None = None
    std: float | None = None
    """Of a number, or a label of integers, over the rows that have one; a constant column has 0."""
    categories: tuple[str, ...] | None = None
    """Of a category: the distinct values as strings, integers in order of value, else sorted."""
    image: ImageEncoding | None = None
    """Of images: the size of the largest, and whether any has colour."""


class DatasetFacts(Frozen):
    """A training dataset. `fingerprint` changes whenever a file is added, removed or rewritten."""

    fingerprint: str
    rows: int = Field(ge=1)
    columns: dict[str, ColumnFacts]
    label: str
    """The column to predict."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names, in order of the classifier's outputs; empty for a regression."""
        return self.columns[self.label].categories or ()

    @property
    def features(self) -> dict[str, ColumnFacts]:
        """Every column but the label, in the dataset's order."""
        return {name: facts for name, facts in self.columns.items() if name != self.label}
