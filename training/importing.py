"""CSV files and folders of images to datasets: Parquet for training and evaluation, with statistics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cluster.config import Frozen


class ImportReport(Frozen):
    """What an import made; what the CLI prints."""

    train: str
    """URI, fit for a recipe's `data.train`."""
    eval: str
    train_rows: int
    eval_rows: int
    label: str
    columns: dict[str, str]
    """The kind of each column (number, category, image, …)."""
    types: dict[str, str]
    """The Parquet type of each column."""
    classes: tuple[str, ...]
    """Empty for a regression."""
    files: int
    size_bytes: int


def import_csv(
    source: str,
    destination: str,
    *,
    label: str,
    eval_fraction: float = 0.2,
    seed: int = 0,
    drop: Sequence[str] = (),
    categories: Sequence[str] = (),
    delimiter: str = ",",
) -> ImportReport:
    """Import a CSV file (perhaps compressed) to `destination/train` and `destination/eval`.

    Args:
        drop: columns to leave out.
        categories: columns to take as categories though their values look like numbers or dates.
    """
    raise NotImplementedError


def import_images(
    folder: Path, destination: str, *, eval_fraction: float = 0.2, seed: int = 0
) -> ImportReport:
    """Import `folder/CLASS/*.png|jpg|jpeg` to `destination/train` and `destination/eval`."""
    raise NotImplementedError
