"""The messages of the Open Inference Protocol's gRPC service, as classes.

Names, numbers and types are the public specification's (`package inference`, Triton's
`ModelStreamInferResponse` included), so they are compatible on the wire with every client of it. They are
made here, at import, rather than by protoc: there is no generated code to keep in step with the protobuf
that is installed, and they live in a pool of their own, so that a process may import a client's copy of
the same messages beside them.
"""

from __future__ import annotations

import re
from typing import Any

from google.protobuf.descriptor_pb2 import DescriptorProto, FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

_PARAMETERS = "map<string, InferParameter> parameters"
_MESSAGES: dict[str, tuple[str, ...]] = {
    "ServerLiveRequest": (),
    "ServerLiveResponse": ("bool live = 1",),
    "ServerReadyRequest": (),
    "ServerReadyResponse": ("bool ready = 1",),
    "ModelReadyRequest": ("string name = 1", "string version = 2"),
    "ModelReadyResponse": ("bool ready = 1",),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": ("string name = 1", "string version = 2", "repeated string extensions = 3"),
    "ModelMetadataRequest": ("string name = 1", "string version = 2"),
    "ModelMetadataResponse": (
        "string name = 1",
        "repeated string versions = 2",
        "string platform = 3",
        "repeated ModelMetadataResponse.TensorMetadata inputs = 4",
        "repeated ModelMetadataResponse.TensorMetadata outputs = 5",
    ),
    "ModelMetadataResponse.TensorMetadata": (
        "string name = 1",
        "string datatype = 2",
        "repeated int64 shape = 3",
    ),
    "InferParameter": (
        "bool bool_param = 1",
        "int64 int64_param = 2",
        "string string_param = 3",
        "double double_param = 4",
        "uint64 uint64_param = 5",
    ),
    "InferTensorContents": (
        "repeated bool bool_contents = 1",
        "repeated int32 int_contents = 2",
        "repeated int64 int64_contents = 3",
        "repeated uint32 uint_contents = 4",
        "repeated uint64 uint64_contents = 5",
        "repeated float fp32_contents = 6",
        "repeated double fp64_contents = 7",
        "repeated bytes bytes_contents = 8",
    ),
    "ModelInferRequest": (
        "string model_name = 1",
        "string model_version = 2",
        "string id = 3",
        f"{_PARAMETERS} = 4",
        "repeated ModelInferRequest.InferInputTensor inputs = 5",
        "repeated ModelInferRequest.InferRequestedOutputTensor outputs = 6",
        "repeated bytes raw_input_contents = 7",
    ),
    "ModelInferRequest.InferInputTensor": (
        "string name = 1",
        "string datatype = 2",
        "repeated int64 shape = 3",
        f"{_PARAMETERS} = 4",
        "InferTensorContents contents = 5",
    ),
    "ModelInferRequest.InferRequestedOutputTensor": ("string name = 1", f"{_PARAMETERS} = 2"),
    "ModelInferResponse": (
        "string model_name = 1",
        "string model_version = 2",
        "string id = 3",
        f"{_PARAMETERS} = 4",
        "repeated ModelInferResponse.InferOutputTensor outputs = 5",
        "repeated bytes raw_output_contents = 6",
    ),
    "ModelInferResponse.InferOutputTensor": (
        "string name = 1",
        "string datatype = 2",
        "repeated int64 shape = 3",
        f"{_PARAMETERS} = 4",
        "InferTensorContents contents = 5",
    ),
    "ModelStreamInferResponse": ("string error_message = 1", "ModelInferResponse infer_response = 2"),
}
_ONEOFS = {"InferParameter": "parameter_choice"}
"""Messages of which only one field is set at a time."""
_FIELD = re.compile(
    r"(?P<repeated>repeated )?(?P<type>map<string, [\w.]+>|[\w.]+) (?P<name>\w+) = (?P<n>\d+)"
)
_SCALARS = {
    name: FieldDescriptorProto.Type.Value(f"TYPE_{name.upper()}")
    for name in ("bool", "int32", "int64", "uint32", "uint64", "float", "double", "string", "bytes")
}


def _file() -> FileDescriptorProto:
    file = FileDescriptorProto(name="open_inference.proto", package=PACKAGE, syntax="proto3")
    made: dict[str, DescriptorProto] = {}
    for name, fields in _MESSAGES.items():
        parent, _, own = name.rpartition(".")
        message = made[name] = (made[parent].nested_type if parent else file.message_type).add(name=own)
        if name in _ONEOFS:
            message.oneof_decl.add(name=_ONEOFS[name])
        for text in fields:
            _add_field(message, name, text)
    return file


def _add_field(message: DescriptorProto, full_name: str, text: str) -> None:
    match = _FIELD.fullmatch(text)
    assert match, text
    field = message.field.add(name=match["name"], number=int(match["n"]))
    is_map = match["type"].startswith("map<")
    repeated = match["repeated"] or is_map
    field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
    if full_name in _ONEOFS:
        field.oneof_index = 0
    if is_map:
        entry = message.nested_type.add(name=match["name"].capitalize() + "Entry")
        entry.options.map_entry = True
        _add_field(entry, "", "string key = 1")
        _add_field(entry, "", match["type"].removeprefix("map<string, ").rstrip(">") + " value = 2")
        _set_type(field, f"{full_name}.{entry.name}")
    else:
        _set_type(field, match["type"])


def _set_type(field: FieldDescriptorProto, name: str) -> None:
    if name in _SCALARS:
        field.type = _SCALARS[name]
    else:
        field.type = field.TYPE_MESSAGE
        field.type_name = f".{PACKAGE}.{name}"


_pool = DescriptorPool()
_pool.Add(_file())


def message_class(name: str) -> Any:
    """The class of a message of the service."""
    return GetMessageClass(_pool.FindMessageTypeByName(f"{PACKAGE}.{name}"))


ServerLiveResponse = message_class("ServerLiveResponse")
ServerReadyResponse = message_class("ServerReadyResponse")
ServerMetadataResponse = message_class("ServerMetadataResponse")
ModelReadyRequest = message_class("ModelReadyRequest")
ModelReadyResponse = message_class("ModelReadyResponse")
ModelMetadataRequest = message_class("ModelMetadataRequest")
ModelMetadataResponse = message_class("ModelMetadataResponse")
InferParameter = message_class("InferParameter")
ModelInferRequest = message_class("ModelInferRequest")
ModelInferResponse = message_class("ModelInferResponse")
ModelStreamInferResponse = message_class("ModelStreamInferResponse")
MESSAGES = tuple(_MESSAGES)
"""The names of all messages."""
