"""Facts of small made-up datasets, for tests of tasks, export and evaluation."""

from __future__ import annotations

from cluster.signature import ImageEncoding
from training.facts import ColumnFacts, DatasetFacts

DIGITS = ColumnFacts(kind="category", categories=tuple("0123456789"))
PRICE = ColumnFacts(kind="number", mean=5e4, std=1e3)

TABLE = {
    # Names as people's files have them, one of which export might well think of itself.
    "mean radius (µm)": ColumnFacts(kind="number", mean=14.0, std=3.5, missing_rows=3),
    "v3": ColumnFacts(kind="number", mean=-2.0, std=0.5),
    "constant": ColumnFacts(kind="number", mean=7.0, std=0.0),
    "colour": ColumnFacts(kind="category", categories=("grün", "red", "日本"), missing_rows=1),
    "never filled": ColumnFacts(kind="category", categories=(), missing_rows=100),
}


def facts(columns: dict[str, ColumnFacts], target: ColumnFacts) -> DatasetFacts:
    """A dataset of `columns` and a label column called `label`."""
    return DatasetFacts(fingerprint="f", rows=100, columns={**columns, "label": target}, label="label")


def image_facts(height: int = 8, width: int = 8, channels: int = 1) -> DatasetFacts:
    """Images of ten classes."""
    encoding = ImageEncoding(height=height, width=width, channels=channels)
    return facts({"image": ColumnFacts(kind="image", image=encoding)}, DIGITS)
