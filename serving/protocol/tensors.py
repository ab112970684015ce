"""What one input of a model takes: which data types and shapes, and how each becomes the graph's array.

A `TensorReader` is built once per input. An image input takes encoded files (BYTES) or pixels (UINT8).
A column, one value a row, may come as [N] or [N, 1]. A float input takes integers and the other float
type too, because clients' libraries choose their types for them.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from cluster.errors import BadRequest, TooLarge, Unprocessable
from cluster.images import MAX_PIXELS, decode
from cluster.signature import NUMPY_DTYPES, Tensor
from serving.protocol import scalars
from serving.protocol.limits import Limits
from serving.protocol.reading import brief
from serving.protocol.requests import Array

Shape = tuple[int, ...]

_ALSO_TAKES = {
    "FP16": ("FP32",),  # JSON has no FP16
    "FP32": ("FP64", "INT64", "INT32"),
    "FP64": ("FP32", "INT64", "INT32"),
}


class TensorReader:
    """Reads the values of one input.

    Args:
        tensor: the input, as the signature has it.
        limits: caps on rows, elements and pixels.
    """

    def __init__(self, tensor: Tensor, limits: Limits) -> None:
        self.tensor = tensor
        self.name = tensor.name
        self.what = f"input {brief(tensor.name)}"
        self.row_shape = tensor.shape[1:]
        self.is_column = self.row_shape in ((), (1,))
        self._limits = limits
        takes = ("BYTES",) if tensor.encoding else _ALSO_TAKES.get(tensor.dtype, ())
        self.takes: tuple[str, ...] = (tensor.dtype, *takes)

    def declared_shapes(self, datatype: str) -> list[Shape]:
        """The shapes in which values of `datatype` may come; -1 is any size but 0."""
        image = self.tensor.encoding
        if self.is_column or (image is not None and datatype == "BYTES"):
            return [(-1,), (-1, 1)]
        if image is not None and image.channels == 1:
            return [self.tensor.shape, self.tensor.shape[:3]]
        return [self.tensor.shape]

    def check_shape(self, datatype: str, shape: Sequence[int]) -> Shape:
        """The full shape that values of `datatype`, declared as `shape`, have in the graph.

        For encoded images this is the shape of the pixels. Nothing is allocated yet.

        Raises:
            Unprocessable: a data type or shape that this input doesn't take, or no rows.
            TooLarge: more rows or elements than the limits allow.
        """
        if datatype not in self.takes:
            raise Unprocessable(
                f"{self.what} has another data type",
                got=brief(datatype),
                allowed=" or ".join(self.takes),
                fix=f"send {self.what} as {self.takes[-1] if self.tensor.encoding else self.tensor.dtype}",
            )
        allowed = self.declared_shapes(datatype)
        if shape and shape[0] == 0:
            raise no_rows(self.what)
        if not any(_fits(shape, form) for form in allowed):
            raise Unprocessable(
                f"{self.what} has another shape",
                got=str(list(shape[:9])) if len(shape) < 9 else f"{len(shape)} axes",
                allowed=" or ".join(str(list(form)).replace("-1", "N") for form in allowed),
                fix="make the shape that of the model; axis 0 counts the rows",
            )
        row_shape = self.row_shape if self.is_column or self.tensor.encoding else shape[1:]
        return self._within_limits((shape[0], *row_shape), as_objects=self.tensor.dtype == "BYTES")

    def from_json(self, data: list[Any], datatype: str, declared: Sequence[int], full: Shape) -> Array:
        """The array of shape `full` from JSON `data`, flat or nested as `declared`.

        Raises:
            BadRequest: `data` has another number of elements, or is nested otherwise, than declared.
            Unprocessable: an element that isn't what the input takes.
        """
        nested = len(declared) > 1 and bool(data) and type(data[0]) is list
        flat = flatten(data, declared, self.what)[0] if nested else data
        count = math.prod(declared)
        if len(flat) != count:
            raise BadRequest(
                f"the data of {self.what} has another size than its shape",
                got=f"{len(flat)} elements",
                allowed=f"{count} elements, for shape {list(declared)}",
                fix="make data and shape agree",
            )
        if self.tensor.encoding is not None and datatype == "BYTES":
            return self._from_files([_from_base64(text, self.what) for text in flat])
        if datatype in scalars.INTEGERS and self.tensor.dtype in scalars.FLOATS:
            return self._from_integers(flat, datatype).reshape(full)
        # JSON's numbers have no type of their own: a float is a float, whichever was declared.
        return self._from_flat(flat).reshape(full)

    def from_binary(self, raw: memoryview, datatype: str, declared: Sequence[int], full: Shape) -> Array:
        """The array of shape `full` from the bytes of the binary tensor extension; raises as `from_json`."""
        count, tensor = math.prod(declared), self.tensor
        if datatype == "BYTES":
            elements = scalars.split_elements(raw, count, self.what)
            if tensor.encoding is not None:
                return self._from_files(elements)
            return scalars.decode_texts(elements, self.what).reshape(full)
        dtype: Any = datatype
        array = scalars.from_binary(raw, dtype, count, nullable=tensor.nullable, what=self.what)
        if datatype != tensor.dtype:
            array = scalars.convert(array, dtype, tensor.dtype, nullable=tensor.nullable, what=self.what)
        return array.reshape(full)

    def from_rows(self, values: list[Any]) -> Array:
        """The array from one JSON value a row, each nested as the row's shape.

        An image's value is `{"b64": "..."}`, the base64 text alone, or nested lists of pixels.

        Raises:
            Unprocessable: a value that isn't what the input takes.
            TooLarge: more elements than the limits allow.
        """
        encoding = self.tensor.encoding
        are_files = encoding is not None and type(values[0]) is not list
        self._within_limits((len(values), *map(abs, self.row_shape)), as_objects=not are_files)
        if are_files:
            return self._from_files([_from_base64(_unwrapped(value), self.what) for value in values])
        full: Shape = (len(values), *self.row_shape)
        if encoding is not None and encoding.channels == 1 and _depth(values) == 3:
            flat, _ = flatten(values, full[:3], self.what)
        elif self.is_column and type(values[0]) is not list:
            flat = values
        else:
            flat, full = flatten(self._null_rows_filled(values), full, self.what)
        return self._from_flat(flat).reshape(full)

    def from_file(self, file: bytes) -> Array:
        """The array of one row from one image file; raises as `from_rows`."""
        return self._from_files([file])

    def missing(self, rows: int) -> Array | None:
        """What stands for an input that is left out: NaN or the empty string; None if it can't be."""
        if not self.tensor.nullable or -1 in self.row_shape:
            return None
        fill = "" if self.tensor.dtype == "BYTES" else np.nan
        return np.full((rows, *self.row_shape), fill, NUMPY_DTYPES[self.tensor.dtype])

    def _within_limits(self, full: Shape, *, as_objects: bool) -> Shape:
        """`full`, if it is within the limits. Elements that are Python objects on the way are dearer."""
        limits = self._limits
        most_elements = limits.max_objects if as_objects else limits.max_tensor_elements
        if full[0] <= limits.max_rows and math.prod(full) <= most_elements:
            return full
        for what, got, most in (
            ("rows", full[0], limits.max_rows),
            ("elements", math.prod(full), most_elements),
        ):
            if got > most:
                raise TooLarge(
                    f"{self.what} has too many {what}",
                    got=f"{got} {what}" if got < 1 << 63 else "more than 2**63",
                    allowed=f"at most {most} {what}",
                    fix="send fewer rows at once",
                )
        return full

    def _from_flat(self, flat: list[Any]) -> Array:
        tensor = self.tensor
        return scalars.from_json(flat, tensor.dtype, nullable=tensor.nullable, what=self.what)

    def _null_rows_filled(self, values: list[Any]) -> list[Any]:
        if not self.tensor.nullable or self.is_column or -1 in self.row_shape or None not in values:
            return values
        nulls = np.full(self.row_shape, None).tolist()
        return [nulls if value is None else value for value in values]

    def _from_integers(self, flat: list[Any], datatype: Any) -> Array:
        """Declared as integers, wanted as floats; a null (if the input is nullable) is NaN."""
        nulls = [value is None for value in flat] if self.tensor.nullable else []
        plain = [0 if value is None else value for value in flat] if any(nulls) else flat
        array = scalars.from_json(plain, datatype, nullable=False, what=self.what)
        array = scalars.convert(array, datatype, self.tensor.dtype, nullable=False, what=self.what)
        if any(nulls):
            array[np.array(nulls)] = np.nan
        return array

    def _from_files(self, files: list[bytes]) -> Array:
        """Decode image files into uint8 [rows, height, width, channels]."""
        encoding = self.tensor.encoding
        assert encoding is not None
        max_pixels = min(MAX_PIXELS, self._limits.max_image_pixels // len(files))
        pixels_NHWC = np.empty((len(files), *self.row_shape), np.uint8)
        for row, file in enumerate(files):
            pixels_NHWC[row] = decode(file, encoding, max_pixels=max_pixels)
        return pixels_NHWC


def no_rows(what: str) -> Unprocessable:
    """The refusal of a request that asks for nothing."""
    return Unprocessable(
        f"{what} has no rows", got="0 rows", allowed="at least 1 row", fix="don't send empty requests"
    )


def flatten(data: list[Any], shape: Sequence[int], what: str) -> tuple[list[Any], Shape]:
    """The elements of `data`, nested as `shape` (-1: any one length), row-major, and the shape they have.

    Raises:
        Unprocessable: ragged, empty, or nested otherwise.
    """
    level, found = data, [len(data)]
    for size in shape[1:]:
        if set(map(type, level)) != {list}:
            raise _misshapen(what, shape, brief(next(item for item in level if type(item) is not list)))
        sizes = set(map(len, level))
        if len(sizes) != 1 or sizes == {0} or (size != -1 and sizes != {size}):
            raise _misshapen(what, shape, f"lists of {', '.join(map(str, sorted(sizes)[:5]))}")
        found.append(sizes.pop())
        level = list(chain.from_iterable(level))
    return level, tuple(found)


def _misshapen(what: str, shape: Sequence[int], got: str) -> Unprocessable:
    return Unprocessable(
        f"{what} is not nested as its shape",
        got=got,
        allowed=f"lists nested as {str([*shape]).replace('-1', 'N')}, none ragged or empty",
        fix="make every row the same shape, that of the model",
    )


def _fits(shape: Sequence[int], form: Shape) -> bool:
    return len(shape) == len(form) and all(
        size > 0 and wanted in (-1, size) for size, wanted in zip(shape, form, strict=True)
    )


def _depth(values: list[Any]) -> int:
    """How deep the first elements are nested, to at most 4."""
    depth, first = 0, values
    while type(first) is list and first and depth < 4:
        depth, first = depth + 1, first[0]
    return depth


def _unwrapped(value: Any) -> Any:
    return value["b64"] if type(value) is dict and value.keys() == {"b64"} else value


def _from_base64(text: Any, what: str) -> bytes:
    try:
        if type(text) is not str:
            raise ValueError
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Unprocessable(
            f"{what} has an image that is not base64",
            got=brief(text),
            allowed="a PNG or JPEG file in base64 (RFC 4648, section 4), on one line",
            fix="encode the file, as with `base64 -w0 FILE`; or send it as binary",
        ) from None
