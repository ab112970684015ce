"""A CSV file to one table, its columns checked to be of use to a task.

A column's type is what all of its values look like; what can't be used is named here, where the file's
own words are still at hand. The whole table is held in memory.

Knows nothing of datasets, of which rows are held out, or of Parquet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv as pacsv
from pyarrow import types as pat

from cluster.errors import BadInput, NotFound, StorageError, shown
from cluster.storage import Location, arrow_filesystem
from training.data.statistics import MAX_INTEGER_CLASSES

_FEWEST_ROWS_A_CLASS = 5


def read_csv(
    source: str, *, label: str, drop: Sequence[str], categories: Sequence[str], delimiter: str
) -> pa.Table:
    """The table in a CSV file; arguments and errors as for `training.data.importing.import_csv`."""
    names = _checked_names(source, _opened(source, _header, delimiter), label, drop, categories)
    convert = pacsv.ConvertOptions(
        include_columns=names, column_types={name: pa.string() for name in categories}
    )

    def whole(stream: Any, parse: pacsv.ParseOptions) -> pa.Table:
        return pacsv.read_csv(stream, parse_options=parse, convert_options=convert)

    table = _opened(source, whole, delimiter)
    _check_types(source, table)
    return table


def csv_classes(source: str, table: pa.Table, name: str) -> NDArray[Any]:
    """The class of each row by the label column `name`; all alike where the label is a quantity.

    Raises:
        BadInput: a row without a label.
    """
    labels = table.column(name)
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


def _header(stream: Any, parse: pacsv.ParseOptions) -> list[str]:
    with pacsv.open_csv(stream, parse_options=parse) as reader:
        return list(reader.schema.names)


def _opened(source: str, read: Callable[[Any, pacsv.ParseOptions], Any], delimiter: str) -> Any:
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
