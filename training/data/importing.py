"""CSV files and folders of images to datasets: Parquet for training and evaluation, with statistics.

The rows held out for evaluation are chosen at random within each class, from a seed, so the same
import gives the same two datasets. Mistakes in the data are found here, where the file can still be
named, rather than in the middle of a training run: every image is decoded once.

Both read local files or, for CSV, whatever storage pyarrow can read; a CSV must fit in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv as pacsv
from pyarrow import types as pat

from cluster import images
from cluster.config import Frozen
from cluster.errors import BadInput, NotFound, StorageError, TandemError, shown
from cluster.storage import Location, arrow_filesystem
from training.data.publish import GROUP_BYTES, Published, check_free, publish
from training.data.split import split_rows
from training.data.statistics import MAX_INTEGER_CLASSES

_FEWEST_ROWS_A_CLASS = 5
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_IMAGE_GROUP_ROWS = 1024
_DECODE_THREADS = 4
_FILES_AT_ONCE = 64


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
    names = _checked_names(source, _read_csv(source, _header, delimiter), label, drop, categories)
    convert = pacsv.ConvertOptions(
        include_columns=names, column_types={name: pa.string() for name in categories}
    )

    def whole(stream: Any, parse: pacsv.ParseOptions) -> pa.Table:
        return pacsv.read_csv(stream, parse_options=parse, convert_options=convert)

    table = _read_csv(source, whole, delimiter)
    _check_types(source, table)
    train, held_out = split_rows(_classes(source, table.column(label), label), eval_fraction, seed)
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
    files, skipped = _image_files(folder)
    classes = [path.relative_to(folder).parts[0] for path in files]
    train, held_out = split_rows(classes, eval_fraction, seed)
    with ThreadPoolExecutor(_DECODE_THREADS, "tandem-import") as pool:
        splits = {
            "train": _image_tables([files[i] for i in train], [classes[i] for i in train], pool),
            "eval": _image_tables([files[i] for i in held_out], [classes[i] for i in held_out], pool),
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


def _header(stream: Any, parse: pacsv.ParseOptions) -> list[str]:
    with pacsv.open_csv(stream, parse_options=parse) as reader:
        return list(reader.schema.names)


def _read_csv(source: str, read: Callable[[Any, pacsv.ParseOptions], Any], delimiter: str) -> Any:
    if len(delimiter) != 1:
        raise BadInput("the delimiter can't be used", got=shown(delimiter), allowed="one character")
    uri = Location.parse(source).uri
    filesystem, path = arrow_filesystem(uri)
    try:
        with filesystem.open_input_stream(path) as stream:
            return read(stream, pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True))
    except FileNotFoundError:
        raise NotFound("there is no such file", got=uri, allowed="a CSV file", fix="check the path") from None
    except pa.ArrowInvalid as error:
        raise BadInput(
            f"{uri} can't be read as CSV",
            got=shown(str(error)),
            allowed="UTF-8, a first line of column names, and as many fields in every row",
            fix="correct that row; for another separator give --delimiter",
        ) from None
    except OSError as error:
        raise StorageError(
            f"reading {uri} failed",
            got=shown(str(error).split("\n", 1)[0]),
            allowed="a file that these credentials may read",
            fix="check the path, the credentials and the network",
        ) from None


def _checked_names(
    source: str, header: list[str], label: str, drop: Sequence[str], categories: Sequence[str]
) -> list[str]:
    """The columns to read."""
    for role, wanted in (("label", [label]), ("dropped", drop), ("category", categories)):
        for name in wanted:
            if name not in header:
                raise BadInput(
                    f"{source} has no column '{name}', named as {role}",
                    got="columns " + ", ".join(header),
                    allowed="a name from the first line",
                    fix="check the spelling; if those are values, add a first line of names",
                )
    names = [name for name in header if name not in drop]
    if label not in names or len(names) < 2:
        raise BadInput(
            "nothing would be left to learn",
            got=f"columns {', '.join(names)}, label {label}",
            allowed="the label and at least one other column",
            fix="drop fewer columns",
        )
    for name in names:
        if names.count(name) > 1 or not 1 <= len(name) <= 200 or not name.isprintable():
            raise BadInput(
                f"column {header.index(name) + 1} of {source} has a name that can't be used",
                got=shown(name),
                allowed="1 to 200 printable characters, no two columns alike",
                fix="rename it in the first line, or drop it",
            )
    return names


def _check_types(source: str, table: pa.Table) -> None:
    for field in table.schema:
        if pat.is_temporal(field.type):
            got, fix = f"{field.type}: dates or times", "turn it into a number, or make it a category"
        elif pat.is_null(field.type):
            got, fix = "no values at all", "drop it"
        elif pat.is_binary(field.type):
            got, fix = "text that isn't UTF-8", "convert the file, for example with iconv"
        else:
            continue
        raise BadInput(
            f"column '{field.name}' of {source} can't be used",
            got=got,
            allowed="numbers, true/false, or strings in UTF-8",
            fix=f"{fix} (--drop '{field.name}' leaves it out)",
        )


def _classes(source: str, labels: pa.ChunkedArray, name: str) -> NDArray[Any]:
    """The class of each row; all alike where the label is a quantity."""
    strings = labels.cast(pa.string())
    missing = pc.fill_null(pc.equal(strings, ""), True).to_numpy()
    if missing.any():
        raise BadInput(
            f"{source} has rows without a label",
            got=f"{int(missing.sum())} rows without '{name}', the first on about line {missing.argmax() + 2}",
            allowed="a label in every row",
            fix="fill or remove those rows",
        )
    codes: NDArray[Any] = strings.combine_chunks().dictionary_encode().indices.to_numpy()
    # Whole numbers that hardly repeat are a quantity too: prices, ages, counts.
    kinds = int(codes.max()) + 1 if len(codes) else 0
    many = kinds > MAX_INTEGER_CLASSES or kinds * _FEWEST_ROWS_A_CLASS > len(codes)
    is_quantity = pat.is_floating(labels.type) or (pat.is_integer(labels.type) and many)
    return np.zeros_like(codes) if is_quantity else codes


def _image_files(folder: Path) -> tuple[list[Path], int]:
    """The images, sorted, and how many other files there are."""
    if not folder.is_dir():
        raise NotFound(
            "there is no such folder", got=str(folder), allowed="a folder of folders", fix="check the path"
        )
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part[0] in "._" for part in path.relative_to(folder).parts)
    )
    taken = [
        path
        for path in files
        if path.suffix.lower() in IMAGE_SUFFIXES and len(path.relative_to(folder).parts) > 1
    ]
    classes = Counter(path.relative_to(folder).parts[0] for path in taken)
    if len(classes) < 2:
        raise BadInput(
            f"'{folder}' doesn't hold at least two classes of images",
            got=f"{len(files)} files; classes {shown(sorted(classes))}",
            allowed="FOLDER/CLASS/NAME.png, .jpg or .jpeg",
            fix="put the images of each class into a folder of its own, called by the class's name",
        )
    return taken, len(files) - len(taken)


def _image_tables(files: list[Path], classes: list[str], pool: ThreadPoolExecutor) -> Iterator[pa.Table]:
    """Tables of up to 1,024 rows or about 8 MiB, in the files' order."""
    contents: list[bytes] = []
    written = held_bytes = 0
    for start in range(0, len(files), _FILES_AT_ONCE):
        for data in pool.map(_checked_image, files[start : start + _FILES_AT_ONCE]):
            contents.append(data)
            held_bytes += len(data)
            done = written + len(contents)
            if len(contents) == _IMAGE_GROUP_ROWS or held_bytes >= GROUP_BYTES or done == len(files):
                labels = classes[written:done]
                yield pa.table({"image": pa.array(contents, pa.binary()), "label": labels})
                contents, held_bytes, written = [], 0, done


def _checked_image(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        images.decode(data, images.probe(data))
        return data
    except TandemError as error:
        raise BadInput(
            f"'{path}': {error.failed}",
            got=error.got,
            allowed=error.allowed,
            fix="remove the file, or write it anew",
        ) from None
    except OSError as error:
        raise BadInput(
            f"'{path}' can't be read",
            got=shown(str(error)),
            allowed="a file that you may read",
            fix="check its rights",
        ) from None
