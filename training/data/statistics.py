"""What a dataset's columns hold, summarised a row group at a time, then merged.

Summaries of parts can be made in parallel; merging them in the row groups' order gives the same
facts to the last bit, however many threads took part. Sums are kept in float64.

Which kind a column is follows from its type, its name and whether it is the label:

    integer, float      number      but an integer label of at most 1,000 values is a category
    boolean, string     category    but a string column called `text` is text
    bytes               image or audio, by the column's name

Knows nothing of files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types as pat

from cluster import images
from cluster.errors import BadInput, TandemError, shown
from cluster.signature import ImageEncoding
from training.facts import ColumnFacts

MAX_CATEGORIES = 100_000
MAX_INTEGER_CLASSES = 1000


class Summary(Protocol):
    """What is known of one column of some rows."""

    def add(self, column: pa.ChunkedArray, name: str, first_row: int) -> Self:
        """This summary of no rows, extended by a column's rows; `first_row` is for errors."""
        ...

    def merge(self, other: Any) -> Self:
        """This and what was found in the rows that follow."""
        ...

    def facts(self, name: str) -> ColumnFacts:
        """The facts.

        Raises:
            BadInput: no task can use such a column.
        """
        ...


Summaries = dict[str, Summary]


def new_summaries(schema: pa.Schema, label: str) -> Summaries:
    """A summary of no rows for each column.

    Raises:
        BadInput: a column that no task can use.
    """
    return {field.name: _new_summary(field, field.name == label) for field in schema}


def summarised(table: pa.Table, label: str, first_row: int) -> Summaries:
    """Summaries of one table, whose first row is row `first_row` of the dataset.

    Raises:
        BadInput: a value that no task can use; names its row.
    """
    empty = new_summaries(table.schema, label)
    return {name: summary.add(table.column(name), name, first_row) for name, summary in empty.items()}


def merged(left: Summaries, right: Summaries) -> Summaries:
    """Both, `right` being of the rows that follow."""
    return {name: summary.merge(right[name]) for name, summary in left.items()}


def check_label(name: str, facts: ColumnFacts) -> None:
    """Refuse a label column that can't be learnt from.

    Raises:
        BadInput: values are missing, or there is only one class.
    """
    if facts.missing_rows:
        raise BadInput(
            f"the label column '{name}' has missing values",
            got=f"{facts.missing_rows:,} rows without a label",
            allowed="a label in every row",
            fix="drop those rows where the dataset is made",
        )
    if facts.kind == "category" and len(facts.categories or ()) < 2:
        raise BadInput(
            f"the label column '{name}' has one class only",
            got=shown(list(facts.categories or ())),
            allowed="at least two classes",
            fix="choose another label column, or add rows of another class",
        )


def _new_summary(field: pa.Field, is_label: bool) -> Summary:
    if pat.is_integer(field.type):
        return _IntegerLabel(_Category(frozenset()), _Number()) if is_label else _Number()
    if pat.is_floating(field.type):
        return _Number()
    if pat.is_large_string(field.type) and field.name == "text" and not is_label:
        return _Text()
    if pat.is_boolean(field.type) or pat.is_large_string(field.type):
        return _Category(frozenset())
    if field.name == "image" and not is_label:
        return _Image()
    if field.name == "audio" and not is_label:
        return _Audio()
    raise BadInput(
        f"column '{field.name}' holds bytes, and its name doesn't say of what",
        got=f"the label column '{field.name}' of bytes" if is_label else f"'{field.name}': {field.type}",
        allowed="bytes called `image` (PNG, JPEG) or `audio` (WAV); labels that are strings or numbers",
        fix="rename the column, turn it into strings, or drop it",
    )


@dataclass(frozen=True)
class _Number:
    rows: int = 0
    missing: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared differences from the mean."""

    def add(self, column: pa.ChunkedArray, name: str, first_row: int) -> Self:
        values = column.cast(pa.float64(), safe=False).to_numpy()
        infinite = np.flatnonzero(np.isinf(values))
        if len(infinite):
            raise BadInput(
                f"column '{name}' has an infinite value",
                got=f"{values[infinite[0]]} in row {first_row + infinite[0]}",
                allowed="finite numbers; null or NaN where there is none",
                fix="clean the column where it is made",
            )
        real = values[~np.isnan(values)]
        mean = float(real.mean()) if len(real) else 0.0
        with np.errstate(over="ignore"):  # `facts` refuses what overflows
            squares = float(np.square(real - mean).sum())
        missing = len(values) - len(real)
        return replace(self, rows=len(real), missing=missing, mean=mean, squares=squares)

    def merge(self, other: Self) -> Self:
        """Chan, Golub and LeVeque, Updating Formulae and a Pairwise Algorithm (1979), formula 2.1."""
        rows = self.rows + other.rows
        if not rows:
            return replace(self, missing=self.missing + other.missing)
        apart = other.mean - self.mean
        return replace(
            self,
            rows=rows,
            missing=self.missing + other.missing,
            mean=self.mean + apart * other.rows / rows,
            squares=self.squares + other.squares + apart * apart * self.rows * other.rows / rows,
        )

    def facts(self, name: str) -> ColumnFacts:
        std = math.sqrt(self.squares / self.rows) if self.rows else 0.0
        if not math.isfinite(std):
            raise BadInput(
                f"the numbers of column '{name}' are too far apart to be summed",
                got=f"mean {self.mean:g}",
                allowed="numbers below about 1e150",
                fix="rescale the column where it is made",
            )
        return ColumnFacts(kind="number", missing_rows=self.missing, mean=self.mean, std=std)


@dataclass(frozen=True)
class _Category:
    values: frozenset[str]
    missing: int = 0

    def add(self, column: pa.ChunkedArray, name: str, first_row: int) -> Self:
        strings = column.cast(pa.large_string())
        # The empty string is how a missing one is written in a tensor, so it is no category.
        missing = strings.null_count + (pc.sum(pc.equal(strings, "")).as_py() or 0)
        values = frozenset(pc.unique(strings).to_pylist()) - {None, ""}
        return replace(self, values=values, missing=missing)

    def merge(self, other: Self) -> Self:
        # Past the limit `facts` will refuse the column; until then only memory is at stake.
        full = len(self.values) > MAX_CATEGORIES
        both = self.values if full or other.values <= self.values else self.values | other.values
        return replace(self, values=both, missing=self.missing + other.missing)

    def facts(self, name: str) -> ColumnFacts:
        if len(self.values) > MAX_CATEGORIES:
            raise BadInput(
                f"column '{name}' has too many different values for a category",
                got=f"more than {MAX_CATEGORIES:,}, such as {shown(min(self.values))}",
                allowed=f"at most {MAX_CATEGORIES:,}",
                fix="drop the column if it is an identifier; call it `text` if it is text",
            )
        return ColumnFacts(kind="category", missing_rows=self.missing, categories=tuple(sorted(self.values)))


@dataclass(frozen=True)
class _IntegerLabel:
    """Classes while they are few, a quantity otherwise; which of them is known only at the end."""

    classes: _Category
    number: _Number

    def add(self, column: pa.ChunkedArray, name: str, first_row: int) -> Self:
        return replace(
            self,
            classes=self.classes.add(column, name, first_row),
            number=self.number.add(column, name, first_row),
        )

    def merge(self, other: Self) -> Self:
        few = len(self.classes.values) <= MAX_INTEGER_CLASSES
        return replace(
            self,
            classes=self.classes.merge(other.classes) if few else self.classes,
            number=self.number.merge(other.number),
        )

    def facts(self, name: str) -> ColumnFacts:
        if len(self.classes.values) > MAX_INTEGER_CLASSES:
            return self.number.facts(name)
        in_order = tuple(sorted(self.classes.values, key=int))
        # The mean and deviation stay, for a regression on a quantity that has few values.
        return self.number.facts(name).model_copy(update={"kind": "category", "categories": in_order})


@dataclass(frozen=True)
class _Image:
    height: int = 0
    width: int = 0
    colour: bool = False

    def add(self, column: pa.ChunkedArray, name: str, first_row: int) -> Self:
        height, width, colour = 0, 0, False
        for row, data in enumerate(column.to_pylist(), first_row):
            try:
                header = images.probe(data or b"")
            except TandemError as error:
                raise BadInput(
                    f"the image in row {row} of column '{name}' can't be read: {error.failed}",
                    got=error.got,
                    allowed=error.allowed,
                    fix="remove the row, or write the image anew",
                ) from None
            height, width = max(height, header.height), max(width, header.width)
            colour = colour or header.channels == 3
        return replace(self, height=height, width=width, colour=colour)

    def merge(self, other: Self) -> Self:
        return replace(
            self,
            height=max(self.height, other.height),
            width=max(self.width, other.width),
            colour=self.colour or other.colour,
        )

    def facts(self, name: str) -> ColumnFacts:
        encoding = ImageEncoding(height=self.height, width=self.width, channels=3 if self.colour else 1)
        return ColumnFacts(kind="image", image=encoding)


@dataclass(frozen=True)
class _Text:
    missing: int = 0

    def add(self, column: pa.ChunkedArray, name: str, first_row: int) -> Self:
        return replace(self, missing=column.null_count)

    def merge(self, other: Self) -> Self:
        return replace(self, missing=self.missing + other.missing)

    def facts(self, name: str) -> ColumnFacts:
        return ColumnFacts(kind="text", missing_rows=self.missing)


class _Audio(_Text):
    def facts(self, name: str) -> ColumnFacts:
        return ColumnFacts(kind="audio", missing_rows=self.missing)
