"""CSV files and folders of images to datasets: Parquet for training and evaluation, with statistics.

The rows held out for evaluation are chosen at random within each class, from a seed, so the same
import gives the same two datasets. Mistakes in the data are found here, where the file can still be
named, rather than in the middle of a training run: every image is decoded once.

Both read local files or, for CSV, whatever storage pyarrow can read; a CSV must fit in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa

from cluster.config import Frozen
from training.data.csv_file import csv_classes, read_csv
from training.data.image_folder import image_files, image_tables
from training.data.publish import Published, check_free, publish
from training.data.split import split_rows

_DECODE_THREADS = 4


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
    """The Arrow type of each column."""
    classes: tuple[str, ...]
    """Empty for a regression."""
    files: int
    size_bytes: int
    skipped_files: int = 0
    """Files in an image folder that are not called .png, .jpg or .jpeg."""


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
    """Import a CSV file to `destination/train` and `destination/eval`.

    The first line names the columns. A column's type is what all of its values look like; an empty
    field is a missing value. Compressed files are known by their name (.gz, .bz2, .zst).

    Args:
        source: a path or a storage URI.
        label: the column to predict.
        eval_fraction: of the rows, held out for evaluation.
        drop: columns to leave out.
        categories: columns to take as they are written, though they look like numbers or dates.

    Raises:
        NotFound: no such file.
        BadInput: the file isn't CSV, or a column can't be used; says which and what to do.
        Conflict: the destination holds data.
        StorageError: the source can't be read or the destination can't be written.
    """
    check_free(destination)
    table = read_csv(source, label=label, drop=drop, categories=categories, delimiter=delimiter)
    train, held_out = split_rows(csv_classes(source, table, label), eval_fraction, seed)
    splits = {"train": [table.take(pa.array(train))], "eval": [table.take(pa.array(held_out))]}
    return _report(publish(splits, destination, label=label), label)


def import_images(
    folder: Path, destination: str, *, eval_fraction: float = 0.2, seed: int = 0
) -> ImportReport:
    """Import `folder/CLASS/*.png|jpg|jpeg` to `destination/train` and `destination/eval`.

    The names of the folders directly below `folder` are the classes; images may lie deeper. The
    datasets have the columns `image` (the files as they are) and `label` (string).

    Raises:
        NotFound: no such folder.
        BadInput: fewer than two classes, or a file that can't be decoded; names it.
        Conflict: the destination holds data.
        StorageError: the destination can't be written.
    """
    check_free(destination)
    files, skipped = image_files(folder)
    classes = [path.relative_to(folder).parts[0] for path in files]
    train, held_out = split_rows(classes, eval_fraction, seed)
    with ThreadPoolExecutor(_DECODE_THREADS, "tandem-import") as pool:
        splits = {
            "train": image_tables([files[i] for i in train], [classes[i] for i in train], pool),
            "eval": image_tables([files[i] for i in held_out], [classes[i] for i in held_out], pool),
        }
        return _report(publish(splits, destination, label="label"), "label", skipped)


def _report(made: Published, label: str, skipped_files: int = 0) -> ImportReport:
    train, held_out = made.records["train"], made.records["eval"]
    return ImportReport(
        train=made.uris["train"],
        eval=made.uris["eval"],
        train_rows=train.facts.rows,
        eval_rows=held_out.facts.rows,
        label=label,
        columns={name: column.kind for name, column in train.facts.columns.items()},
        types=train.types,
        classes=train.facts.labels,
        files=made.files,
        size_bytes=made.size_bytes,
        skipped_files=skipped_files,
    )
