"""From a flat list of JSON values, or from raw bytes, to one checked array of one data type.

Nothing is coerced: no strings to numbers, no floats to integers, no booleans to either. An integer
is a good float; in a float tensor each number is rounded to the nearest value the type holds.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from cluster.errors import BadRequest, Unprocessable
from cluster.signature import NUMPY_DTYPES, DataType
from serving.protocol.reading import brief
from serving.protocol.requests import Array

FLOATS = ("FP16", "FP32", "FP64")
INTEGERS = ("UINT8", "INT8", "INT16", "INT32", "INT64")

_ALLOWED_TYPES: dict[str, frozenset[type]] = (
    {dtype: frozenset({int, float}) for dtype in FLOATS}
    | {dtype: frozenset({int}) for dtype in INTEGERS}
    | {"BOOL": frozenset({bool}), "BYTES": frozenset({str})}
)
_ALLOWED_TEXT = (
    dict.fromkeys(FLOATS, "numbers")
    | {
        dtype: f"integers from {np.iinfo(NUMPY_DTYPES[dtype]).min} to {np.iinfo(NUMPY_DTYPES[dtype]).max}"
        for dtype in INTEGERS
    }
    | {"BOOL": "true or false", "BYTES": "strings"}
)
_LITTLE_ENDIAN = {
    dtype: np.dtype(name).newbyteorder("<") for dtype, name in NUMPY_DTYPES.items() if dtype != "BYTES"
}
_EXACT_INTEGERS = {"FP32": 2**24, "FP64": 2**53 - 1}
"""Integers up to here, of either sign, are held exactly (and so are told apart)."""


def from_json(values: list[Any], dtype: DataType, *, nullable: bool, what: str) -> Array:
    """`values` as a one-dimensional array of `dtype`; null is NaN, or the empty string in BYTES.

    Raises:
        Unprocessable: an element of another type, out of range, or null where that isn't nullable.
    """
    found = set(map(type, values))
    has_nulls = nullable and type(None) in found
    if has_nulls:
        found.discard(type(None))
    if not found <= _ALLOWED_TYPES[dtype]:
        good = _ALLOWED_TYPES[dtype] | ({type(None)} if nullable else set())
        index = next(index for index, value in enumerate(values) if type(value) not in good)
        raise _wrong_value(what, index, values[index], dtype, nullable)
    if dtype == "BYTES":
        return _strings([value or "" for value in values] if has_nulls else values, what)
    if dtype in FLOATS:
        with np.errstate(over="ignore"):
            array = np.array(values, NUMPY_DTYPES[dtype])
        _check_finite(array, dtype, nan_allowed=has_nulls, what=what)
        return array
    try:
        return np.array(values, NUMPY_DTYPES[dtype])
    except OverflowError:
        info = np.iinfo(NUMPY_DTYPES[dtype])
        index = next(index for index, value in enumerate(values) if not info.min <= value <= info.max)
        raise _wrong_value(what, index, values[index], dtype, nullable) from None


def from_binary(raw: memoryview, dtype: DataType, count: int, *, nullable: bool, what: str) -> Array:
    """`raw`, which holds `count` little-endian numbers, as a one-dimensional array; not copied if aligned.

    Raises:
        BadRequest: the number of bytes isn't what `count` takes.
        Unprocessable: NaN or infinity where that isn't allowed; a boolean that is neither 0 nor 1.
    """
    little = _LITTLE_ENDIAN[dtype]
    if len(raw) != count * little.itemsize:
        raise BadRequest(
            f"the binary data of {what} has another size than its shape",
            got=f"{len(raw)} bytes",
            allowed=f"{count} x {little.itemsize} bytes of {dtype}",
            fix="make shape, datatype and binary_data_size agree",
        )
    if dtype == "BOOL":
        flags = np.frombuffer(raw, np.uint8)
        if flags.max() > 1:
            raise _wrong_value(what, int(flags.argmax()), int(flags.max()), dtype, nullable)
        return flags.view(np.bool_)
    array = np.frombuffer(raw, little).astype(NUMPY_DTYPES[dtype], copy=False)
    if dtype in FLOATS:
        _check_finite(array, dtype, nan_allowed=nullable, what=what)
    return array if array.flags.aligned else array.copy()


def split_elements(raw: memoryview, count: int, what: str) -> list[bytes]:
    """The `count` byte strings in `raw`, each led by its length in 4 bytes, little-endian.

    Raises:
        BadRequest: more, fewer, or an element that runs past the end.
    """
    elements: list[bytes] = []
    at = 0
    while at < len(raw) and len(elements) < count:
        if at + 4 > len(raw):
            break
        (size,) = struct.unpack_from("<I", raw, at)
        if at + 4 + size > len(raw):
            break
        elements.append(bytes(raw[at + 4 : at + 4 + size]))
        at += 4 + size
    if at != len(raw) or len(elements) != count:
        raise BadRequest(
            f"the binary data of {what} does not hold its elements",
            got=f"{len(elements)} whole elements in {at} of {len(raw)} bytes",
            allowed=f"{count} elements, each led by its length (4 bytes, little-endian)",
            fix="make shape, lengths and binary_data_size agree",
        )
    return elements


def decode_texts(elements: Sequence[bytes], what: str) -> Array:
    """Byte strings as text.

    Raises:
        Unprocessable: not UTF-8, or with a NUL in it.
    """
    texts: list[str] = []
    for index, element in enumerate(elements):
        try:
            texts.append(element.decode())
        except UnicodeDecodeError as error:
            raise Unprocessable(
                f"{what} has a string that is not UTF-8",
                got=f"byte {error.object[error.start]:#04x} at {error.start} of element {index}",
                allowed="strings in UTF-8",
                fix="encode strings as UTF-8",
            ) from None
    return _strings(texts, what)


def convert(array: Array, dtype: DataType, target: DataType, *, nullable: bool, what: str) -> Array:
    """A numeric array of `dtype` as the float type `target`; integers only where none is rounded.

    Raises:
        Unprocessable: an integer too large to be exact, or a number beyond the range of `target`.
    """
    if dtype in INTEGERS:
        most = _EXACT_INTEGERS[target]
        wrong = (array > most) | (array < -most)
        if wrong.any():
            index = int(wrong.argmax())
            raise Unprocessable(
                f"{what} has an integer that {target} can't hold exactly",
                got=f"{array.flat[index]} at element {index}",
                allowed=f"integers from {-most} to {most}",
                fix=f"send {what} as {target} if rounding is meant",
            )
        return array.astype(NUMPY_DTYPES[target])
    with np.errstate(over="ignore"):
        converted = array.astype(NUMPY_DTYPES[target])
    _check_finite(converted, target, nan_allowed=nullable, what=what)
    return converted


def _strings(texts: list[str], what: str) -> Array:
    if "\0" in "".join(texts):
        index = next(index for index, text in enumerate(texts) if "\0" in text)
        raise Unprocessable(
            f"{what} has a NUL character in a string",
            got=f"{brief(texts[index])} at element {index}",
            allowed="strings without NUL",
            fix="take the NUL out",
        )
    array = np.empty(len(texts), object)
    array[:] = texts
    return array


def _check_finite(array: Array, dtype: DataType, *, nan_allowed: bool, what: str) -> None:
    if np.isfinite(array).all():
        return
    bad = np.isinf(array) if nan_allowed else ~np.isfinite(array)
    if not bad.any():
        return
    index = int(bad.argmax())
    missing = "; NaN for a missing value" if nan_allowed else ""
    raise Unprocessable(
        f"{what} has a value that is not a finite {dtype}",
        got=f"{array.flat[index]} at element {index}",
        allowed=f"finite numbers within ±{float(np.finfo(NUMPY_DTYPES[dtype]).max):.6g}{missing}",
        fix="replace it, or leave the row out",
    )


def _wrong_value(what: str, index: int, value: Any, dtype: DataType, nullable: bool) -> Unprocessable:
    numbers_for_strings = dtype == "BYTES" and type(value) in (int, float, bool)
    fix = 'write the value in quotes, as in "7"' if numbers_for_strings else f"send values of type {dtype}"
    if value is None:
        fix = "the model takes no missing values here: fill it in, or leave the row out"
    return Unprocessable(
        f"{what} has a value it does not take",
        got=f"{brief(value)} at element {index}",
        allowed=_ALLOWED_TEXT[dtype] + (" or null" if nullable else ""),
        fix=fix,
    )
