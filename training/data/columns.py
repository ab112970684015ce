"""From a table's columns to the arrays that a model or a servable takes.

The one place where this happens: training, the gate and export's check call it, so they cannot
differ in what a missing value or a category is. Whole columns are converted at a time; only images
are decoded one by one.

    tensor                  column                 array
    image                   bytes                  uint8 [B, H, W, C]
    FP16, FP32, FP64        numbers, booleans      NaN where missing; infinite refused
    other numbers, BOOL     numbers, booleans      must fit exactly; missing refused
    BYTES                   anything but bytes     object (str), "" where missing

Knows nothing of files, batches' order or devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import types as pat

from cluster.errors import BadInput, shown
from cluster.signature import NUMPY_DTYPES, Signature, Tensor
from training.data.pictures import decoded_images
from training.data.rows import BadRow, RowIds, column_of, holds_bytes, row_number
from training.data.words import class_indices, word_indices
from training.facts import DatasetFacts
from training.task import TARGET, Arrays


def input_arrays(
    table: pa.Table, signature: Signature, *, pool: Executor | None = None, row_ids: RowIds | None = None
) -> Arrays:
    """Raw inputs, exactly as the servable takes them, by the signature's names; axis 0 is the row.

    Args:
        pool: decodes images in parallel; without it they are decoded here.
        row_ids: int64 [B], how errors name the rows; without it, places in `table`.

    Raises:
        BadInput: a column is missing, or a value isn't what the signature takes; names row and value.
    """
    return {
        tensor.name: input_array(table, tensor, pool=pool, row_ids=row_ids) for tensor in signature.inputs
    }


def input_array(
    table: pa.Table, tensor: Tensor, *, pool: Executor | None = None, row_ids: RowIds | None = None
) -> NDArray[Any]:
    """One raw input; arguments and errors as for `input_arrays`."""
    column = column_of(table, tensor.name)
    if tensor.encoding is not None:
        return decoded_images(table, tensor, pool, row_ids)
    if holds_bytes(column.type):
        raise BadInput(
            f"column '{tensor.name}' holds bytes, which this input doesn't take",
            got=str(column.type),
            allowed=f"what fits a tensor of {tensor.dtype}",
            fix="convert the column where it is made",
        )
    if tensor.dtype == "BYTES":
        if not tensor.nullable:
            _refuse_missing(_missing_strings(column), column, tensor, row_ids)
        values: NDArray[Any] = pc.fill_null(column.cast(pa.large_string()), "").to_numpy()
    else:
        values = _numbers(column, tensor, row_ids)
    return values.reshape(-1, *(1 for _ in tensor.shape[1:]))


def target_array(table: pa.Table, facts: DatasetFacts, *, row_ids: RowIds | None = None) -> NDArray[Any]:
    """The label column: int64 [B] class indices, or float32 [B] for a regression.

    Raises:
        BadInput: a label that is missing, or isn't one of the facts' labels; names row and value.
    """
    column = column_of(table, facts.label)
    if not facts.labels:
        label = Tensor(name=facts.label, dtype="FP32", shape=(-1,))
        return _numbers(column, label, row_ids)
    indices = class_indices(column, facts.labels)
    unknown = np.flatnonzero(indices < 0)
    if len(unknown):
        row = row_number(unknown[0], row_ids)
        raise BadRow(
            f"row {row} has a label that the training data doesn't have",
            row,
            got=shown(column[int(unknown[0])].as_py()),
            allowed=f"one of {len(facts.labels)} labels: {shown(list(facts.labels))}",
            fix=f"correct the column '{facts.label}', or add such rows to the training data",
        )
    return indices


def model_arrays(
    table: pa.Table,
    signature: Signature,
    vocabularies: Mapping[str, tuple[str, ...]],
    facts: DatasetFacts,
    *,
    pool: Executor | None = None,
    row_ids: RowIds | None = None,
) -> Arrays:
    """What the model takes in training: the inputs, words encoded, and the target under `TARGET`."""
    arrays: Arrays = {
        tensor.name: model_input(table, tensor, vocabularies.get(tensor.name), pool=pool, row_ids=row_ids)
        for tensor in signature.inputs
    }
    return arrays | {TARGET: target_array(table, facts, row_ids=row_ids)}


def model_input(
    table: pa.Table,
    tensor: Tensor,
    vocabulary: tuple[str, ...] | None,
    *,
    pool: Executor | None = None,
    row_ids: RowIds | None = None,
) -> NDArray[Any]:
    """One of `model_arrays`; `vocabulary` is for a tensor of words, else None."""
    if vocabulary is None:
        return input_array(table, tensor, pool=pool, row_ids=row_ids)
    # The same as encode_words(input_array(…)), without making a Python string of each value.
    column = column_of(table, tensor.name)
    if not tensor.nullable:
        _refuse_missing(_missing_strings(column), column, tensor, row_ids)
    indices = word_indices(column.cast(pa.large_string()), vocabulary)
    return indices.reshape(-1, *(1 for _ in tensor.shape[1:]))


def _missing_strings(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    strings = column.cast(pa.large_string())
    return np.asarray(pc.fill_null(pc.equal(strings, ""), True).to_numpy())


def _refuse_missing(
    missing: NDArray[np.bool_], column: pa.ChunkedArray, tensor: Tensor, row_ids: RowIds | None
) -> None:
    if not tensor.nullable and missing.any():
        place = int(missing.argmax())
        row = row_number(place, row_ids)
        raise BadRow(
            f"row {row} has no value for '{tensor.name}'",
            row,
            got=shown(column[place].as_py()),
            allowed="a value in every row: the model was made for data with none missing",
            fix="fill or drop such rows, or train on data in which some values are missing",
        )


def _numbers(column: pa.ChunkedArray, tensor: Tensor, row_ids: RowIds | None) -> NDArray[Any]:
    dtype = np.dtype(NUMPY_DTYPES[tensor.dtype])
    if not (pat.is_integer(column.type) or pat.is_floating(column.type) or pat.is_boolean(column.type)):
        raise BadInput(
            f"column '{tensor.name}' doesn't hold numbers",
            got=str(column.type),
            allowed="integers, floats or booleans, as in the training data",
            fix="convert the column where it is made",
        )
    if dtype.kind == "f":
        plain = _as_floats(column)
        with np.errstate(over="ignore"):
            values: NDArray[Any] = plain.astype(dtype, copy=False)
        if np.isfinite(values).all():
            return values
        _refuse_missing(np.isnan(values), column, tensor, row_ids)
        wrong = np.isinf(values)
    else:
        missing = np.asarray(pc.is_null(column, nan_is_null=True).to_numpy())
        _refuse_missing(missing, column, tensor, row_ids)
        plain = column.to_numpy()
        with np.errstate(invalid="ignore"):
            values = plain.astype(dtype)
        wrong = values != plain
    if wrong.any():
        place = int(wrong.argmax())
        row = row_number(place, row_ids)
        raise BadRow(
            f"row {row} has a value for '{tensor.name}' that a {tensor.dtype} can't hold",
            row,
            got=shown(column[place].as_py()),
            allowed=f"finite numbers that fit {tensor.dtype}",
            fix="clean or rescale the column where it is made",
        )
    return values


def _as_floats(column: pa.ChunkedArray) -> NDArray[Any]:
    """NaN where missing; without a copy where the column's own memory will do, so not to be written to."""
    if pat.is_float32(column.type) or pat.is_float64(column.type):
        values: NDArray[Any] = column.to_numpy()
    else:
        values = column.cast(pa.float64(), safe=False).to_numpy()
    return values
