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
from concurrent.futures import Executor, Future
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import types as pat

from cluster.errors import BadInput, shown
from cluster.signature import NUMPY_DTYPES, Signature, Tensor
from training.data.decoder import BadImage
from training.data.decoding import Decode, decode_here
from training.facts import DatasetFacts
from training.task import TARGET, Arrays

RowIds = NDArray[np.int64]
IMAGES_PER_JOB = 32
SMALL_IMAGE_BYTES = 8 * 1024
"""Below this mean size of file, threads lose more by handing the interpreter around than they gain."""
_DENSE_LABELS = 4096


class BadRow(BadInput):
    """What is wrong with one row. `row`: its number, as the caller numbers rows."""

    def __init__(self, failed: str, row: int = 0, **parts: str) -> None:
        super().__init__(failed, **parts)
        self.row = row


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
    column = _column(table, tensor.name)
    if tensor.encoding is not None:
        return _images(table, tensor, pool, row_ids)
    if _holds_bytes(column.type):
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
    column = _column(table, facts.label)
    if not facts.labels:
        label = Tensor(name=facts.label, dtype="FP32", shape=(-1,))
        return _numbers(column, label, row_ids)
    indices = _class_indices(column, facts.labels)
    unknown = np.flatnonzero(indices < 0)
    if len(unknown):
        row = _row(unknown[0], row_ids)
        raise BadRow(
            f"row {row} has a label that the training data doesn't have",
            row,
            got=shown(column[int(unknown[0])].as_py()),
            allowed=f"one of {len(facts.labels)} labels: {shown(list(facts.labels))}",
            fix=f"correct the column '{facts.label}', or add such rows to the training data",
        )
    return indices


def images_begun(
    table: pa.Table,
    tensor: Tensor,
    pool: Executor,
    *,
    decode: Decode = decode_here,
    images_per_job: int = IMAGES_PER_JOB,
    row_ids: RowIds | None = None,
) -> tuple[NDArray[np.uint8], list[Future[None]]]:
    """An image tensor that is being filled, uint8 [B, H, W, C], and the jobs that fill it.

    A job raises what `input_arrays` does; the pixels are there when every job is done.
    """
    column, pixels = _image_column(table, tensor)
    starts = range(0, len(pixels), images_per_job)
    return pixels, [
        pool.submit(_decode_part, column, tensor, pixels, start, start + images_per_job, decode, row_ids)
        for start in starts
    ]


def encode_words(values: NDArray[Any], vocabulary: tuple[str, ...]) -> NDArray[np.int64]:
    """Indices of words: int64, of the shape of `values` (object). 0: missing or unseen; else i + 1."""
    words = pa.array(values.reshape(-1), pa.large_string())
    return _word_indices(words, vocabulary).reshape(values.shape)


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
    column = _column(table, tensor.name)
    if not tensor.nullable:
        _refuse_missing(_missing_strings(column), column, tensor, row_ids)
    indices = _word_indices(column.cast(pa.large_string()), vocabulary)
    return indices.reshape(-1, *(1 for _ in tensor.shape[1:]))


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise BadInput(
            f"the data has no column '{name}'",
            got="columns " + ", ".join(table.column_names),
            allowed="every input of the model, and the label",
            fix=f"add '{name}' to the data",
        )
    return table.column(name)


def _holds_bytes(kind: pa.DataType) -> bool:
    return bool(pat.is_binary(kind) or pat.is_large_binary(kind))


def _row(place: int, row_ids: RowIds | None) -> int:
    return int(place if row_ids is None else row_ids[place])


def _word_indices(words: Any, vocabulary: tuple[str, ...]) -> NDArray[np.int64]:
    # "" means a missing value, so it is looked for in vain even in a vocabulary that has it.
    known = pa.array([word or None for word in vocabulary], pa.large_string())
    found = pc.fill_null(pc.index_in(words, known, skip_nulls=True), -1)
    return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int64) + 1


def _class_indices(column: pa.ChunkedArray, labels: tuple[str, ...]) -> NDArray[np.int64]:
    """The place of each value among `labels`: int64, -1 where it isn't one of them."""
    known = pa.array(labels, pa.large_string())
    if pat.is_large_string(column.type):
        found = pc.fill_null(pc.index_in(column, known), -1)
        return np.asarray(found.to_numpy(), dtype=np.int64)
    if pat.is_integer(column.type) and len(column) and not column.null_count:
        values = column.to_numpy()
        lowest, highest = int(values.min()), int(values.max())
        if highest - lowest < _DENSE_LABELS:
            words = pa.array(range(lowest, highest + 1), column.type).cast(pa.large_string())
            of_value = pc.fill_null(pc.index_in(words, known), -1).to_numpy(zero_copy_only=False)
            # As many bits as an index has: eight don't hold the difference of any two numbers of eight.
            wide = values if values.itemsize == 8 else values.astype(np.int64)
            places = (wide - wide.dtype.type(lowest)).astype(np.intp)
            dense: NDArray[np.int64] = np.asarray(of_value, np.int64)[places]
            return dense
    # A string is made of each distinct value only, since that takes longer than all the rest.
    encoded = pc.dictionary_encode(column.combine_chunks())
    words = encoded.dictionary.cast(pa.large_string())
    # A missing value's code is -1, so it finds the -1 that stands at the end.
    of_code = np.append(pc.fill_null(pc.index_in(words, known), -1).to_numpy(zero_copy_only=False), -1)
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    indices: NDArray[np.int64] = of_code.astype(np.int64)[codes]
    return indices


def _missing_strings(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    strings = column.cast(pa.large_string())
    return np.asarray(pc.fill_null(pc.equal(strings, ""), True).to_numpy())


def _refuse_missing(
    missing: NDArray[np.bool_], column: pa.ChunkedArray, tensor: Tensor, row_ids: RowIds | None
) -> None:
    if not tensor.nullable and missing.any():
        place = int(missing.argmax())
        row = _row(place, row_ids)
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
        row = _row(place, row_ids)
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


def _images(
    table: pa.Table, tensor: Tensor, pool: Executor | None, row_ids: RowIds | None
) -> NDArray[np.uint8]:
    if pool is not None and table.column(tensor.name).nbytes >= SMALL_IMAGE_BYTES * table.num_rows:
        pixels, jobs = images_begun(table, tensor, pool, row_ids=row_ids)
        for job in jobs:
            job.result()
        return pixels
    column, pixels = _image_column(table, tensor)
    _decode_part(column, tensor, pixels, 0, len(pixels), decode_here, row_ids)
    return pixels


def _image_column(table: pa.Table, tensor: Tensor) -> tuple[pa.ChunkedArray, NDArray[np.uint8]]:
    """The files, and room for their pixels."""
    column = _column(table, tensor.name)
    if not _holds_bytes(column.type):
        raise BadInput(
            f"column '{tensor.name}' doesn't hold images",
            got=str(column.type),
            allowed="bytes: whole PNG or JPEG files",
            fix="make the dataset with `tandem data import images`",
        )
    encoding = tensor.encoding
    assert encoding is not None, "the tensor is no image"
    shape = (len(column), encoding.height, encoding.width, encoding.channels)
    return column.cast(pa.large_binary()), np.empty(shape, np.uint8)


def _decode_part(
    column: pa.ChunkedArray,
    tensor: Tensor,
    pixels: NDArray[np.uint8],
    start: int,
    stop: int,
    decode: Decode,
    row_ids: RowIds | None,
) -> None:
    assert tensor.encoding is not None
    try:
        decode(column.slice(start, stop - start), tensor.encoding, pixels[start:stop])
    except BadImage as error:
        row = _row(start + error.place, row_ids)
        raise BadRow(
            f"row {row} of '{tensor.name}': {error.failed}",
            row,
            got=error.got,
            allowed=error.allowed,
            fix="remove the row, or write the image anew",
        ) from None
