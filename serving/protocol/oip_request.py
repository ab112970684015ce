"""Reads the Open Inference Protocol v2's infer request, JSON or with binary tensors.

With the binary extension the JSON comes first, the header `inference-header-content-length` says how long
it is, and the bytes of the binary tensors follow in the order in which the JSON names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cluster.errors import BadRequest, TooLarge, Unprocessable
from cluster.signature import Signature
from serving.protocol.limits import Limits
from serving.protocol.reading import (
    as_list,
    as_object,
    as_parameters,
    brief,
    check_body_size,
    listed,
    near,
    read_json,
    refuse_encodings,
)
from serving.protocol.requests import HEADER_LENGTH, Arrays, InferRequest, OutputSpec, Parameters
from serving.protocol.tensors import TensorReader

_NOT_OFFERED = ("shared_memory_region", "classification")
_INTEGER = {int}


class _Declared(NamedTuple):
    """An input as the JSON announces it, its structure checked."""

    reader: TensorReader
    datatype: str
    shape: list[int]
    data: list[Any] | None
    binary_bytes: int


def announced_json_bytes(headers: Mapping[bytes, bytes]) -> int | None:
    """How many bytes of JSON are said to lead a body with binary tensors; None where nothing readable is."""
    text = headers.get(HEADER_LENGTH)
    # Twenty digits are enough for any length, and int() of unbounded text is slow.
    return int(text) if text is not None and text.isdigit() and len(text) <= 20 else None


def parse(
    body: bytes | memoryview,
    headers: Mapping[bytes, bytes],
    signature: Signature,
    readers: Mapping[str, TensorReader],
    limits: Limits,
) -> InferRequest:
    """Read an infer request; see `Codec.parse_oip`."""
    check_body_size(body, limits)
    refuse_encodings(headers)
    json_bytes = _json_bytes(headers, len(body))
    text = body if json_bytes == len(body) and isinstance(body, bytes) else bytes(body[:json_bytes])
    document = as_object(read_json(text, limits), "the request", ("inputs",), ("id", "parameters", "outputs"))
    parameters = as_parameters(document.get("parameters"), "the request")
    # One more than the model has can't all be right, so there is no need to look at further ones.
    listed_inputs = as_list(document["inputs"], "'inputs'")[: len(readers) + 1]
    declared = [_declare(item, readers) for item in listed_inputs]
    _check_all_there(declared, readers)
    tail = memoryview(body)[json_bytes:]
    _check_tail(tail, declared)

    inputs: Arrays = {}
    at = rows = 0
    for item in declared:
        full = item.reader.check_shape(item.datatype, item.shape)
        if inputs and full[0] != rows:
            raise Unprocessable(
                "the inputs have different numbers of rows",
                got=f"{full[0]} in {item.reader.what}, {rows} in the first",
                allowed="the same size of axis 0 in every input",
                fix="send every input for the same rows",
            )
        rows = full[0]
        if item.data is not None:
            array = item.reader.from_json(item.data, item.datatype, item.shape, full)
        else:
            raw = tail[at : at + item.binary_bytes]
            at += item.binary_bytes
            array = item.reader.from_binary(raw, item.datatype, item.shape, full)
        inputs[item.reader.name] = array
    return InferRequest(
        inputs=inputs,
        rows=rows,
        request_id=_request_id(document.get("id"), limits),
        outputs=_requested_outputs(document.get("outputs"), parameters, signature),
        parameters=parameters,
    )


def _json_bytes(headers: Mapping[bytes, bytes], body_bytes: int) -> int:
    text = headers.get(HEADER_LENGTH)
    if text is None:
        return body_bytes
    announced = announced_json_bytes(headers)
    if announced is None or announced > body_bytes:
        raise BadRequest(
            "the header Inference-Header-Content-Length can't be right",
            got=brief(text.decode("latin-1")),
            allowed=f"an integer from 0 to {body_bytes}, the length of the body",
            fix="set it to the number of bytes of JSON that lead the body",
        )
    return announced


def _declare(item: Any, readers: Mapping[str, TensorReader]) -> _Declared:
    entry = as_object(item, "an input", ("name", "shape", "datatype"), ("parameters", "data"))
    name, shape, datatype = entry["name"], entry["shape"], entry["datatype"]
    if type(name) is not str or type(datatype) is not str:
        raise BadRequest(
            "an input's name and datatype are not strings",
            got=f"name {brief(name)}, datatype {brief(datatype)}",
            allowed="strings",
            fix="name the input and its datatype as the model's metadata does",
        )
    reader = readers.get(name)
    if reader is None:
        raise Unprocessable(
            "the model has no such input", got=brief(name), allowed=listed(readers), fix=near(name, readers)
        )
    if type(shape) is not list or len(shape) > 32 or not _are_sizes(shape):
        raise BadRequest(
            f"the shape of {reader.what} can't be read",
            got=f"[{', '.join(map(brief, shape[:9]))}]" if type(shape) is list else brief(shape),
            allowed="a list of at most 32 integers, none negative",
            fix="send the sizes that the data has; axis 0 counts the rows",
        )
    parameters = as_parameters(entry.get("parameters"), reader.what)
    _refuse_not_offered(parameters, reader.what)
    return _Declared(reader, datatype, shape, *_where_data_is(entry, parameters, reader))


def _are_sizes(shape: list[Any]) -> bool:
    return set(map(type, shape)) <= _INTEGER and min(shape, default=0) >= 0


def _where_data_is(
    entry: dict[str, Any], parameters: Parameters, reader: TensorReader
) -> tuple[list[Any] | None, int]:
    """The JSON data, or the number of bytes of binary data: just one of them may be there."""
    data, size = entry.get("data"), parameters.get("binary_data_size")
    if size is None and type(data) is list:
        if entry["datatype"] == "FP16":
            raise Unprocessable(
                f"{reader.what} is FP16 in JSON, which has no such type",
                got="FP16 with data",
                allowed="FP16 as a binary tensor, or FP32",
                fix="send it as FP32, or use the protocol's binary extension",
            )
        return data, 0
    if data is None and type(size) is int and size >= 0:
        return None, size
    raise BadRequest(
        f"{reader.what} has no data that can be read",
        got=f"data: {brief(data)}, binary_data_size: {brief(size)}",
        allowed="either 'data', a list, or the parameter 'binary_data_size', a count of bytes",
        fix="send one of the two",
    )


def _check_all_there(declared: list[_Declared], readers: Mapping[str, TensorReader]) -> None:
    names = {item.reader.name for item in declared}
    if len(names) < len(declared):
        raise BadRequest(
            "an input is there twice",
            got=listed([item.reader.name for item in declared]),
            allowed="each input once",
            fix="send one tensor for each input",
        )
    if len(names) < len(readers):
        missing = [name for name in readers if name not in names]
        raise Unprocessable(
            "the request lacks inputs of the model",
            got=listed(names) or "none",
            allowed=f"all of {listed(readers)}",
            fix=f"add {listed(missing)}",
        )


def _check_tail(tail: memoryview, declared: list[_Declared]) -> None:
    announced = sum(item.binary_bytes for item in declared)
    if announced != len(tail):
        raise BadRequest(
            "the binary data after the JSON has another size than its inputs announce",
            got=f"{len(tail)} bytes",
            allowed=f"{announced} bytes, the sum of binary_data_size",
            fix="make the header Inference-Header-Content-Length, binary_data_size and the body agree",
        )


def _request_id(value: Any, limits: Limits) -> str | None:
    if value is None:
        return None
    if type(value) is not str or not value.isprintable():
        raise BadRequest(
            "the request's id can't be used",
            got=brief(value),
            allowed="a string of printable characters",
            fix="send another id, or none",
        )
    if len(value) > limits.max_id_chars:
        raise TooLarge(
            "the request's id is too long",
            got=f"{len(value)} characters",
            allowed=f"at most {limits.max_id_chars} characters",
            fix="send a shorter id, or none",
        )
    return value


def _requested_outputs(value: Any, parameters: Parameters, signature: Signature) -> tuple[OutputSpec, ...]:
    """What to answer with. An output's own `binary_data` outranks the request's `binary_data_output`."""
    all_binary = _flag(parameters, "binary_data_output", default=False)
    if not all_binary and (value is None or value == []):
        return ()
    names = [tensor.name for tensor in signature.outputs]
    if value is None or value == []:
        return tuple(OutputSpec(name, binary=True) for name in names)
    specs: dict[str, OutputSpec] = {}
    for item in as_list(value, "'outputs'"):
        entry = as_object(item, "a requested output", ("name",), ("parameters",))
        name = entry["name"]
        if type(name) is not str or name not in names:
            raise Unprocessable(
                "the model has no such output",
                got=brief(name),
                allowed=listed(names),
                fix=near(name if type(name) is str else "", names),
            )
        if name in specs:
            raise BadRequest(
                "an output is asked for twice", got=brief(name), allowed="each output once", fix="ask once"
            )
        own = as_parameters(entry.get("parameters"), f"output {brief(name)}")
        _refuse_not_offered(own, f"output {brief(name)}")
        specs[name] = OutputSpec(name, binary=_flag(own, "binary_data", default=all_binary))
    return tuple(specs.values())


def _flag(parameters: Parameters, name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise BadRequest(
            f"the parameter {name!r} is not a boolean",
            got=brief(value),
            allowed="true or false",
            fix="send true or false",
        )
    return value


def _refuse_not_offered(parameters: Parameters, what: str) -> None:
    for name in _NOT_OFFERED:
        if parameters.get(name):
            raise Unprocessable(
                f"{what} asks for an extension that this server does not have",
                got=name,
                allowed="the extensions in the server's metadata",
                fix="leave that parameter out",
            )
