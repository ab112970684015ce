"""Between the messages of gRPC and the bodies of HTTP: the same protocol in two spellings.

Tensors travel as they are: what a client sends as raw bytes becomes the binary extension's tail unread,
and back. Typed contents (`fp32_contents` and so on) are packed to the same bytes. Nothing is checked here
that the replica checks anyway (names, shapes, sizes, ranges, terms), so there is one judge of a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import orjson
from google.protobuf.message import DecodeError

from cluster.errors import BadRequest, TooLarge, Unprocessable
from serving.grpc.messages import (
    InferParameter,
    ModelInferRequest,
    ModelInferResponse,
    ModelMetadataResponse,
    ServerMetadataResponse,
)
from serving.protocol.reading import brief
from serving.protocol.requests import HEADER_LENGTH

_TYPED: dict[str, tuple[str, str]] = {
    "BOOL": ("bool_contents", "|b1"),
    "INT8": ("int_contents", "<i1"),
    "INT16": ("int_contents", "<i2"),
    "INT32": ("int_contents", "<i4"),
    "INT64": ("int64_contents", "<i8"),
    "UINT8": ("uint_contents", "<u1"),
    "UINT16": ("uint_contents", "<u2"),
    "UINT32": ("uint_contents", "<u4"),
    "UINT64": ("uint64_contents", "<u8"),
    "FP32": ("fp32_contents", "<f4"),
    "FP64": ("fp64_contents", "<f8"),
    "BYTES": ("bytes_contents", ""),
}
"""By datatype: the field with its values, and how one is written in raw bytes."""


class HttpBody(NamedTuple):
    """An infer request as HTTP has it: JSON, then the bytes of its tensors."""

    body: bytes
    json_bytes: int


def read_infer_request(data: bytes) -> Any:
    """A `ModelInferRequest`.

    Raises:
        BadRequest: the bytes aren't one.
    """
    try:
        return ModelInferRequest.FromString(data)
    except DecodeError:
        raise BadRequest(
            "the message can't be read",
            got=f"{len(data)} bytes",
            allowed="a ModelInferRequest of the Open Inference Protocol",
            fix="make the client's code from the protocol's .proto file",
        ) from None


def to_http(request: Any, max_bytes: int) -> HttpBody:
    """A `ModelInferRequest` as the body of `POST /v2/models/NAME/infer`, which asks for binary outputs.

    Args:
        max_bytes: of the tensors together.

    Raises:
        BadRequest: raw and typed contents contradict each other.
        TooLarge: packed, it would be over the limit.
        Unprocessable: a value is out of its datatype's range, or the datatype has no typed contents.
    """
    tensors = _tensors(request, max_bytes)
    inputs = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": list(tensor.shape),
            "parameters": _from_parameters(tensor.parameters) | {"binary_data_size": len(raw)},
        }
        for tensor, raw in zip(request.inputs, tensors, strict=True)
    ]
    document: dict[str, Any] = {
        "inputs": inputs,
        "parameters": _from_parameters(request.parameters) | {"binary_data_output": True},
    }
    if request.id:
        document["id"] = request.id
    if request.outputs:
        document["outputs"] = [
            {"name": wanted.name, "parameters": _from_parameters(wanted.parameters) | {"binary_data": True}}
            for wanted in request.outputs
        ]
    text = orjson.dumps(document)
    return HttpBody(b"".join([text, *tensors]), len(text))


def from_http(body: bytes, headers: Mapping[bytes, bytes]) -> Any:
    """The `ModelInferResponse` of what HTTP answered to `to_http`'s request."""
    at = int(headers.get(HEADER_LENGTH, len(body)))
    document = orjson.loads(body[:at])
    response = ModelInferResponse(
        model_name=document["model_name"],
        model_version=document.get("model_version", ""),
        id=document.get("id", ""),
    )
    _to_parameters(document.get("parameters", {}), response.parameters)
    for output in document["outputs"]:
        parameters = output.get("parameters", {})
        size = parameters.pop("binary_data_size")
        tensor = response.outputs.add(name=output["name"], datatype=output["datatype"], shape=output["shape"])
        _to_parameters(parameters, tensor.parameters)
        response.raw_output_contents.append(body[at : at + size])
        at += size
    return response


def server_metadata(body: bytes) -> Any:
    """The `ServerMetadataResponse` of what HTTP says of the server."""
    document = orjson.loads(body)
    return ServerMetadataResponse(**{key: document[key] for key in ("name", "version", "extensions")})


def model_metadata(body: bytes) -> Any:
    """The `ModelMetadataResponse` of what HTTP says of a model. It has no place for parameters."""
    document = orjson.loads(body)
    response = ModelMetadataResponse(
        name=document["name"], versions=document["versions"], platform=document["platform"]
    )
    for side in ("inputs", "outputs"):
        for tensor in document[side]:
            getattr(response, side).add(
                name=tensor["name"], datatype=tensor["datatype"], shape=tensor["shape"]
            )
    return response


def _tensors(request: Any, max_bytes: int) -> list[bytes]:
    """The bytes of each input."""
    if not request.raw_input_contents:
        return _packed(request.inputs, max_bytes)
    if len(request.raw_input_contents) != len(request.inputs):
        raise BadRequest(
            "raw_input_contents has not one entry for each input",
            got=f"{len(request.raw_input_contents)} entries, {len(request.inputs)} inputs",
            allowed="the raw bytes of every input, in the order of the inputs",
            fix="send every input as raw bytes, or every one as typed contents",
        )
    for tensor in request.inputs:
        if tensor.HasField("contents"):
            raise BadRequest(
                "an input has its data twice",
                got=f"input {brief(tensor.name)} with contents, beside raw_input_contents",
                allowed="either raw_input_contents or contents",
                fix="send one of the two",
            )
    return list(request.raw_input_contents)


def _packed(inputs: Any, max_bytes: int) -> list[bytes]:
    packed: list[bytes] = []
    left_bytes = max_bytes
    for tensor in inputs:
        what = f"input {brief(tensor.name)}"
        packed.append(_pack(tensor, what, left_bytes))
        left_bytes -= len(packed[-1])
    return packed


def _pack(tensor: Any, what: str, max_bytes: int) -> bytes:
    if tensor.datatype not in _TYPED:
        if not tensor.contents.ByteSize():
            return b""  # there is nothing to pack; the replica says what it takes
        raise Unprocessable(
            f"{what} is of a datatype that has no typed contents",
            got=brief(tensor.datatype),
            allowed=", ".join(_TYPED),
            fix="send it as raw_input_contents",
        )
    field, form = _TYPED[tensor.datatype]
    wrong = [descriptor.name for descriptor, _ in tensor.contents.ListFields() if descriptor.name != field]
    if wrong:
        raise BadRequest(
            f"{what} has its values in another field than its datatype's",
            got=f"{tensor.datatype} in {', '.join(wrong)}",
            allowed=f"{tensor.datatype} in {field}",
            fix=f"put the values into {field}, or send raw_input_contents",
        )
    values = getattr(tensor.contents, field)
    if tensor.datatype == "BYTES":
        _check_room(sum(map(len, values)) + 4 * len(values), max_bytes)
        return b"".join(len(value).to_bytes(4, "little") + value for value in values)
    dtype = np.dtype(form)
    _check_room(len(values) * dtype.itemsize, max_bytes)
    try:
        return np.array(values, dtype).tobytes()
    except OverflowError:
        info = np.iinfo(dtype)
        index = next(index for index, value in enumerate(values) if not info.min <= value <= info.max)
        raise Unprocessable(
            f"{what} has a value it does not take",
            got=f"{values[index]} at element {index}",
            allowed=f"integers from {info.min} to {info.max}",
            fix=f"send values of type {tensor.datatype}",
        ) from None


def _check_room(size_bytes: int, max_bytes: int) -> None:
    if size_bytes > max_bytes:
        raise TooLarge(
            "the tensors are too large",
            got=f"{size_bytes} bytes",
            allowed=f"at most {max_bytes} bytes",
            fix="send fewer rows in a request",
        )


def _from_parameters(parameters: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in parameters.items():
        choice = value.WhichOneof("parameter_choice")
        found[name] = getattr(value, choice) if choice is not None else None
    return found


def _to_parameters(found: Mapping[str, Any], parameters: Any) -> None:
    for name, value in found.items():
        match value:
            case bool():
                parameters[name].CopyFrom(InferParameter(bool_param=value))
            case int():
                parameters[name].CopyFrom(InferParameter(int64_param=value))
            case float():
                parameters[name].CopyFrom(InferParameter(double_param=value))
            case str():
                parameters[name].CopyFrom(InferParameter(string_param=value))
