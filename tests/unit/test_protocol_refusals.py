"""Every bad Open Inference Protocol request gets the right status and says what is wrong in four parts."""

import base64
import struct

import numpy as np
import orjson
import pytest
from protocol_models import digits, picture_file, refused, single, table

from serving.protocol.codec import Codec
from serving.protocol.limits import Limits

LIMITS = Limits(
    max_body_bytes=1_000_000,
    max_rows=100,
    max_objects=50_000,
    max_tensor_elements=100_000,
    max_id_chars=16,
)
LENGTH = b"inference-header-content-length"


def tensor(**changes: object) -> dict:
    """A good tensor for `single()`, with changes; a value of None takes the key out."""
    good = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": [1, 2, 3, 4.5]}
    return {key: value for key, value in {**good, **changes}.items() if value is not None}


def infer(*tensors: dict, **more: object) -> bytes:
    return orjson.dumps({"inputs": list(tensors), **more})


GOOD = infer(tensor())

UNREADABLE = {
    "nothing": (b"", "not JSON"),
    "not JSON": (b"hello", "not JSON"),
    "nested 200,000 deep": (b"[" * 200_000 + b"]" * 200_000, "not JSON"),
    "nested 900 deep, which the parser takes": (b"[" * 900 + b"]" * 900, "not an object"),
    "objects nested deep": (b'{"a":' * 200_000, "not JSON"),
    "a 5,000-digit integer": (b'{"inputs": ' + b"9" * 5000 + b"}", "not JSON"),
    "bad UTF-8": (b'{"inputs": "\xff\xfe"}', "not JSON"),
    "a lone surrogate": (b'{"inputs": "\\ud800"}', "not JSON"),
    "NaN": (GOOD.replace(b"4.5", b"NaN"), "not JSON"),
    "Infinity": (GOOD.replace(b"4.5", b"-Infinity"), "not JSON"),
    "beyond float64": (GOOD.replace(b"4.5", b"1e999"), "not JSON"),
    "more after the document": (GOOD + b"x", "not JSON"),
    "cut short": (GOOD[:-1], "not JSON"),
    "a list": (b"[]", "the request is not an object"),
    "a number": (b"7", "the request is not an object"),
    "no inputs": (b"{}", "lacks 'inputs'"),
    "an unknown key": (infer(tensor(), ouputs=[]), "unknown key"),
    "inputs are null": (b'{"inputs": null}', "'inputs' is not a list"),
    "inputs are an object": (b'{"inputs": {"x": 1}}', "'inputs' is not a list"),
    "an input is a string": (b'{"inputs": ["x"]}', "an input is not an object"),
    "an input has an unknown key": (infer(tensor(dtype="FP32")), "unknown key"),
    "no name": (infer(tensor(name=None)), "lacks 'name'"),
    "a name that is a number": (infer(tensor(name=7)), "not strings"),
    "a datatype that is a list": (infer(tensor(datatype=["FP32"])), "not strings"),
    "no shape": (infer(tensor(shape=None)), "lacks 'shape'"),
    "a shape that is a number": (infer(tensor(shape=4)), "shape of input 'x' can't be read"),
    "a shape of floats": (infer(tensor(shape=[1.0, 4])), "shape of input 'x' can't be read"),
    "a shape of booleans": (infer(tensor(shape=[True, 4])), "shape of input 'x' can't be read"),
    "a shape of strings": (infer(tensor(shape=["1", 4])), "shape of input 'x' can't be read"),
    "a negative size": (infer(tensor(shape=[-1, 4])), "shape of input 'x' can't be read"),
    "a shape of 10,000 axes": (infer(tensor(shape=[1] * 10_000)), "shape of input 'x' can't be read"),
    "an input twice": (infer(tensor(), tensor()), "an input is there twice"),
    "more data than the shape": (infer(tensor(data=[1, 2, 3, 4, 5])), "another size than its shape"),
    "less data than the shape": (infer(tensor(data=[1, 2, 3])), "another size than its shape"),
    "no data": (infer(tensor(data=None)), "no data that can be read"),
    "data is an object": (infer(tensor(data={"0": 1})), "no data that can be read"),
    "data is a string": (infer(tensor(data="1234")), "no data that can be read"),
    "both data and a binary size": (
        infer(tensor(parameters={"binary_data_size": 16})),
        "no data that can be",
    ),
    "parameters are a list": (infer(tensor(), parameters=[1]), "parameters of the request can't be read"),
    "a parameter is an object": (infer(tensor(), parameters={"a": {}}), "parameters of the request can't"),
    "an input's parameters are a number": (
        infer(tensor(parameters=3)),
        "parameters of input 'x' can't be read",
    ),
    "an id that is a number": (infer(tensor(), id=7), "id can't be used"),
    "an id with a line break": (infer(tensor(), id="a\r\nb"), "id can't be used"),
    "outputs are an object": (infer(tensor(), outputs={}), "'outputs' is not a list"),
    "an output twice": (infer(tensor(), outputs=[{"name": "value"}] * 2), "asked for twice"),
    "an output without a name": (infer(tensor(), outputs=[{}]), "lacks 'name'"),
    "binary_data is a number": (
        infer(tensor(), outputs=[{"name": "value", "parameters": {"binary_data": 1}}]),
        "'binary_data' is not a boolean",
    ),
    "binary_data_output is a string": (
        infer(tensor(), parameters={"binary_data_output": "yes"}),
        "'binary_data_output' is not a boolean",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_400(case: str) -> None:
    body, message = UNREADABLE[case]
    error = refused(Codec(single(), "m", LIMITS).parse_oip, body, {})
    assert (error.http_status, message in error.failed) == (400, True), error


UNTAKEN = {
    "an unknown input": (single(), infer(tensor(name="y")), "no such input"),
    "no input at all": (single(), infer(), "lacks inputs"),
    "a missing input": (
        table(),
        infer({"name": "age", "shape": [1], "datatype": "FP32", "data": [1]}),
        "lacks inputs",
    ),
    "an extra input": (single(), infer(tensor(), tensor(name="z")), "no such input"),
    "another data type": (single(), infer(tensor(datatype="BYTES", data=list("abcd"))), "another data type"),
    "an unknown data type": (single(), infer(tensor(datatype="FP8")), "another data type"),
    "FP16 in JSON": (single("FP16"), infer(tensor(datatype="FP16")), "FP16 in JSON"),
    "another shape": (single(), infer(tensor(shape=[1, 5], data=[1] * 5)), "another shape"),
    "another rank": (single(), infer(tensor(shape=[4])), "another shape"),
    "rank 0": (single(), infer(tensor(shape=[], data=[1])), "another shape"),
    "overflowing product": (single(), infer(tensor(shape=[2**62, 2**62])), "another shape"),
    "no rows": (single(), infer(tensor(shape=[0, 4], data=[])), "no rows"),
    "an axis of 0": (single(row_shape=(-1,)), infer(tensor(shape=[1, 0], data=[])), "another shape"),
    "a boolean for a number": (single(), infer(tensor(data=[1, 2, 3, True])), "a value it does not take"),
    "a string for a number": (single(), infer(tensor(data=[1, 2, 3, "4"])), "a value it does not take"),
    "an object for a number": (single(), infer(tensor(data=[1, 2, 3, {}])), "a value it does not take"),
    "null": (
        single(),
        infer(tensor(data=[1, 2, 3, 0]).copy()).replace(b"3,0", b"3,null"),
        "a value it does not",
    ),
    "beyond FP32": (single(), infer(tensor(data=[1, 2, 3, 1e39])), "not a finite FP32"),
    "an inexact integer": (
        single(),
        infer(tensor(datatype="INT64", data=[1, 2, 3, 2**24 + 1])),
        "can't hold exactly",
    ),
    "a float in declared integers": (
        single(),
        infer(tensor(datatype="INT64", data=[1, 2, 3, 4.5])),
        "a value it does not take",
    ),
    "a float for an integer": (
        single("INT64"),
        infer(tensor(datatype="INT64", data=[1, 2, 3, 4.0])),
        "a value it does not take",
    ),
    "too large for UINT8": (
        single("UINT8"),
        infer(tensor(datatype="UINT8", data=[1, 2, 3, 256])),
        "a value it does not take",
    ),
    "negative in UINT8": (
        single("UINT8"),
        infer(tensor(datatype="UINT8", data=[1, 2, 3, -1])),
        "a value it does not take",
    ),
    "too large for INT64": (
        single("INT64"),
        infer(tensor(datatype="INT64", data=[1, 2, 3, 2**63])),
        "a value it does not take",
    ),
    "a number for BOOL": (
        single("BOOL"),
        infer(tensor(datatype="BOOL", data=[True, False, True, 1])),
        "a value it does not take",
    ),
    "integers for BYTES": (
        single("BYTES"),
        infer(tensor(datatype="INT64", data=[1, 2, 3, 4])),
        "another data type",
    ),
    "a number in BYTES": (
        single("BYTES"),
        infer(tensor(datatype="BYTES", data=["a", "b", "c", 7])),
        "a value it does not take",
    ),
    "NUL in a string": (
        single("BYTES"),
        infer(tensor(datatype="BYTES", data=["a", "b", "c", "d\0e"])),
        "NUL character",
    ),
    "ragged data": (single(), infer(tensor(data=[[1, 2, 3], [4]], shape=[2, 4])), "not nested as its shape"),
    "data nested too deep": (
        single(),
        infer(tensor(data=[[[1], [2], [3], [4]]])),
        "a value it does not take",
    ),
    "rows that differ": (
        table(),
        infer(
            {"name": "age", "shape": [2], "datatype": "FP32", "data": [1, 2]},
            {"name": "city", "shape": [1], "datatype": "BYTES", "data": ["a"]},
            {"name": "rooms", "shape": [1], "datatype": "INT64", "data": [1]},
            {"name": "owner", "shape": [1], "datatype": "BOOL", "data": [True]},
        ),
        "different numbers of rows",
    ),
    "an unknown output": (single(), infer(tensor(), outputs=[{"name": "valeu"}]), "no such output"),
    "an output named by a list": (single(), infer(tensor(), outputs=[{"name": []}]), "no such output"),
    "classification": (
        single(),
        infer(tensor(), outputs=[{"name": "value", "parameters": {"classification": 3}}]),
        "an extension that this server does not have",
    ),
    "shared memory": (
        single(),
        infer(tensor(data=None, parameters={"shared_memory_region": "a"})),
        "an extension that this server does not have",
    ),
    "an image that is not base64": (
        digits(),
        infer({"name": "image", "shape": [1], "datatype": "BYTES", "data": ["not base64!"]}),
        "not base64",
    ),
    "an image that is no image": (
        digits(),
        infer({"name": "image", "shape": [1], "datatype": "BYTES", "data": ["aGVsbG8="]}),
        "can't be decoded",
    ),
    "pixels of another size": (
        digits(),
        infer({"name": "image", "shape": [1, 4, 4], "datatype": "UINT8", "data": [0] * 16}),
        "another shape",
    ),
    "grey pixels for a colour model": (
        digits(3),
        infer({"name": "image", "shape": [1, 8, 8], "datatype": "UINT8", "data": [0] * 64}),
        "another shape",
    ),
    "float pixels": (
        digits(),
        infer({"name": "image", "shape": [1, 8, 8, 1], "datatype": "FP32", "data": [0] * 64}),
        "another data type",
    ),
}


@pytest.mark.parametrize("case", UNTAKEN)
def test_what_the_model_does_not_take_is_422(case: str) -> None:
    signature, body, message = UNTAKEN[case]
    error = refused(Codec(signature, "m", LIMITS).parse_oip, body, {})
    assert (error.http_status, message in error.failed) == (422, True), error


TOO_LARGE = {
    "a body over the limit": (single(), GOOD + b" " * 1_000_000, "the body is too large"),
    "too many JSON values": (single(), b"[" + b"[]," * 60_000 + b"0]", "too many values"),
    "a billion rows": (single(), infer(tensor(shape=[10**9, 4])), "too many rows"),
    "2**63 rows": (single(), infer(tensor(shape=[2**63, 4])), "too many rows"),
    "too many elements": (
        single(row_shape=(-1, -1)),
        infer(tensor(shape=[1, 2**40, 2**40])),
        "too many elements",
    ),
    "a long id": (single(), infer(tensor(), id="a" * 17), "id is too long"),
    "an image with too many pixels": (
        digits(),
        infer(
            {
                "name": "image",
                "shape": [1],
                "datatype": "BYTES",
                "data": [base64.b64encode(picture_file(np.zeros((7100, 7100), np.uint8))).decode()],
            }
        ),
        "too many pixels",
    ),
}


@pytest.mark.parametrize("case", TOO_LARGE)
def test_what_is_over_a_limit_is_413(case: str) -> None:
    signature, body, message = TOO_LARGE[case]
    error = refused(Codec(signature, "m", LIMITS).parse_oip, body, {})
    assert (error.http_status, message in error.failed) == (413, True), error


def binary(signature_tensor: dict, raw: bytes, *, announced: int | None = None) -> tuple[bytes, int]:
    size = len(raw) if announced is None else announced
    text = infer(tensor(**signature_tensor, data=None, parameters={"binary_data_size": size}))
    return text + raw, len(text)


FLOATS = struct.pack("<4f", 1, 2, 3, 4)
STRINGS = b"".join(struct.pack("<I", len(text)) + text for text in (b"a", b"", b"ccc", b"d"))
AS_BYTES = {"datatype": "BYTES"}

BAD_BINARY = {
    "truncated": ("FP32", {}, FLOATS[:-1], 400, "another size than its shape"),
    "one element too many": ("FP32", {}, FLOATS + b"\0\0\0\0", 400, "another size than its shape"),
    "empty": ("FP32", {}, b"", 400, "another size than its shape"),
    "NaN": ("FP32", {}, struct.pack("<4f", 1, 2, 3, np.nan), 422, "not a finite FP32"),
    "infinity": ("FP32", {}, struct.pack("<4f", 1, 2, 3, -np.inf), 422, "not a finite FP32"),
    "FP64 beyond FP32": ("FP32", {"datatype": "FP64"}, struct.pack("<4d", 1, 2, 3, 1e39), 422, "finite FP32"),
    "FP32 beyond FP16": ("FP16", {"datatype": "FP32"}, struct.pack("<4f", 1, 2, 3, 7e4), 422, "finite FP16"),
    "an inexact integer": (
        "FP32",
        {"datatype": "INT64"},
        struct.pack("<4q", 1, 2, 3, -(2**63)),
        422,
        "can't hold exactly",
    ),
    "a boolean of 2": ("BOOL", {"datatype": "BOOL"}, b"\0\1\2\1", 422, "a value it does not take"),
    "a string's length past the end": ("BYTES", AS_BYTES, STRINGS[:-1], 400, "does not hold its elements"),
    "half a length": ("BYTES", AS_BYTES, STRINGS[:-3], 400, "does not hold its elements"),
    "a length of 4 GB": ("BYTES", AS_BYTES, b"\xff\xff\xff\xffabc", 400, "does not hold its elements"),
    "too many strings": ("BYTES", AS_BYTES, STRINGS + b"\0\0\0\0", 400, "does not hold its elements"),
    "too few strings": ("BYTES", AS_BYTES, STRINGS[:5], 400, "does not hold its elements"),
    "a string that is not UTF-8": ("BYTES", AS_BYTES, STRINGS.replace(b"ccc", b"c\xffc"), 422, "not UTF-8"),
    "a string with NUL": ("BYTES", AS_BYTES, STRINGS.replace(b"ccc", b"c\0c"), 422, "NUL character"),
}


@pytest.mark.parametrize("case", BAD_BINARY)
def test_bad_binary_tensors(case: str) -> None:
    dtype, changes, raw, status, message = BAD_BINARY[case]
    body, length = binary(changes, raw)
    error = refused(Codec(single(dtype), "m", LIMITS).parse_oip, body, {LENGTH: str(length).encode()})
    assert (error.http_status, message in error.failed) == (status, True), error


@pytest.mark.parametrize("announced", [0, 15, 17, 2**62])
def test_a_lying_binary_data_size_is_400(announced: int) -> None:
    body, length = binary({}, FLOATS, announced=announced)
    error = refused(Codec(single(), "m", LIMITS).parse_oip, body, {LENGTH: str(length).encode()})
    assert (error.http_status, "another size than its inputs announce" in error.failed) == (400, True)


@pytest.mark.parametrize("size", [-1, 16.0, True, "16"])
def test_a_binary_data_size_that_is_no_size_is_400(size: object) -> None:
    text = infer(tensor(data=None, parameters={"binary_data_size": size}))
    error = refused(Codec(single(), "m", LIMITS).parse_oip, text + FLOATS, {LENGTH: str(len(text)).encode()})
    assert (error.http_status, "no data that can be read" in error.failed) == (400, True)


@pytest.mark.parametrize(
    "text", [b"-1", b"", b"abc", b"1.5", b"99999", b"9" * 5000, b"0x10", "١".encode(), b" 9"]
)
def test_a_header_length_that_cannot_be_is_400(text: bytes) -> None:
    error = refused(Codec(single(), "m", LIMITS).parse_oip, GOOD, {LENGTH: text})
    assert (error.http_status, "Inference-Header-Content-Length" in error.failed) == (400, True)


def test_binary_data_without_the_header_is_400() -> None:
    text = infer(tensor(data=None, parameters={"binary_data_size": 16}))
    assert refused(Codec(single(), "m", LIMITS).parse_oip, text, {}).http_status == 400
    assert refused(Codec(single(), "m", LIMITS).parse_oip, text + FLOATS, {}).http_status == 400


def test_a_header_that_cuts_the_json_short_is_400() -> None:
    for length in (b"0", b"10", str(len(GOOD) - 1).encode()):
        assert refused(Codec(single(), "m", LIMITS).parse_oip, GOOD, {LENGTH: length}).http_status == 400


def test_a_compressed_body_is_415() -> None:
    codec = Codec(single(), "m", LIMITS)
    assert refused(codec.parse_oip, GOOD, {b"content-encoding": b"gzip"}).http_status == 415
    assert codec.parse_oip(GOOD, {b"content-encoding": b"identity"}).rows == 1
