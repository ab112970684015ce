"""JSON schemas (2020-12) of what one model takes and gives, as strict as a schema can be.

A schema can't say that the product of a shape is the length of its data, or that all inputs have equally
many rows; the server checks these and answers 400 or 422.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cluster.signature import NUMPY_DTYPES, DataType, Signature, Tensor
from serving.protocol.limits import Limits
from serving.protocol.scalars import FLOATS, INTEGERS
from serving.protocol.tensors import TensorReader

Schema = dict[str, Any]

_MAX_SPELLED_ELEMENTS = 4096
"""Rows with more elements are described as plain lists: nobody types them."""

PARAMETERS: Schema = {
    "type": "object",
    "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
}


def element(dtype: DataType, *, nullable: bool = False) -> Schema:
    """One value of a tensor of `dtype`."""
    if dtype in FLOATS:
        most = float(np.finfo(NUMPY_DTYPES[dtype]).max)
        schema: Schema = {"type": "number", "minimum": -most, "maximum": most}
    elif dtype in INTEGERS:
        info = np.iinfo(NUMPY_DTYPES[dtype])
        schema = {"type": "integer", "minimum": int(info.min), "maximum": int(info.max)}
    elif dtype == "BOOL":
        schema = {"type": "boolean"}
    else:
        schema = {"type": "string", "pattern": r"^[^\u0000]*$"}
    return {**schema, "type": [schema["type"], "null"]} if nullable else schema


def row_values(tensor: Tensor) -> list[Schema]:
    """The forms that one row's value of an input may have in predict; one request keeps to one form."""
    image = tensor.encoding
    if image is None:
        row_shape = () if tensor.shape[1:] == (1,) else tensor.shape[1:]
        return [_nested(element(tensor.dtype, nullable=tensor.nullable), row_shape)]
    base64: Schema = {
        "type": "string",
        "contentEncoding": "base64",
        "contentMediaType": "image/png",
        "description": "a PNG or JPEG file",
    }
    forms: list[Schema] = [_closed({"b64": base64}), base64]
    if math.prod(tensor.shape[1:]) <= _MAX_SPELLED_ELEMENTS:
        forms.append(_nested(element("UINT8"), tensor.shape[1:]))
        if image.channels == 1:
            forms.append(_nested(element("UINT8"), tensor.shape[1:3]))
    return forms


def predict_request(signature: Signature, limits: Limits) -> Schema:
    """The body of `POST /v1/models/{name}:predict`."""
    named = _closed(
        {tensor.name: {"anyOf": row_values(tensor)} for tensor in signature.inputs},
        optional=tuple(tensor.name for tensor in signature.inputs if tensor.nullable),
    )
    bare = row_values(signature.inputs[0]) if len(signature.inputs) == 1 else []
    forms: list[Schema] = [{"items": form} for form in (named, *bare)]
    instances = {"type": "array", "minItems": 1, "maxItems": limits.max_rows, "anyOf": forms}
    return _closed({"instances": instances})


def predict_response(signature: Signature) -> Schema:
    """Its answer."""
    row = {tensor.name: _prediction(tensor, signature.labels) for tensor in signature.outputs}
    return _closed(
        {
            "model": {"type": "string"},
            "version": {"type": "string"},
            "predictions": {"type": "array", "items": _closed(row)},
        }
    )


def infer_request(signature: Signature, limits: Limits) -> Schema:
    """The JSON body of the Open Inference Protocol's infer request."""
    count = len(signature.inputs)
    forms = [_infer_input(TensorReader(tensor, limits), limits) for tensor in signature.inputs]
    outputs = {
        "type": "array",
        "items": _closed(
            {"name": {"enum": [tensor.name for tensor in signature.outputs]}, "parameters": PARAMETERS},
            optional=("parameters",),
        ),
    }
    return _closed(
        {
            "id": {"type": "string", "maxLength": limits.max_id_chars},
            "parameters": PARAMETERS,
            "inputs": {"type": "array", "minItems": count, "maxItems": count, "items": {"anyOf": forms}},
            "outputs": outputs,
        },
        optional=("id", "parameters", "outputs"),
    )


def infer_response(signature: Signature) -> Schema:
    """The JSON answer to it."""
    output = _closed(
        {
            "name": {"enum": [tensor.name for tensor in signature.outputs]},
            "datatype": {"enum": sorted({tensor.dtype for tensor in signature.outputs})},
            "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
            "parameters": PARAMETERS,
            "data": {"type": "array"},
        },
        optional=("parameters", "data"),
    )
    return _closed(
        {
            "model_name": {"type": "string"},
            "model_version": {"type": "string"},
            "id": {"type": "string"},
            "outputs": {"type": "array", "items": output},
        },
        optional=("id",),
    )


def _infer_input(reader: TensorReader, limits: Limits) -> Schema:
    datatypes = [datatype for datatype in reader.takes if datatype != "FP16"]
    shapes = {shape for datatype in datatypes for shape in reader.declared_shapes(datatype)}
    is_flat_scalar = reader.is_column and reader.tensor.encoding is None
    value = element(reader.tensor.dtype, nullable=reader.tensor.nullable) if is_flat_scalar else {}
    items = {"anyOf": [value, {"type": "array", "items": value}]} if is_flat_scalar else value
    return _closed(
        {
            "name": {"const": reader.name},
            "shape": {"anyOf": [_shape(shape, limits) for shape in sorted(shapes)]},
            "datatype": {"enum": datatypes},
            "parameters": PARAMETERS,
            "data": {"type": "array", "minItems": 1, "items": items},
        },
        optional=("parameters",),
    )


def _shape(shape: tuple[int, ...], limits: Limits) -> Schema:
    rows = {"type": "integer", "minimum": 1, "maximum": limits.max_rows}
    other = {**rows, "maximum": limits.max_tensor_elements}
    sizes = [rows, *(other if size == -1 else {"const": size} for size in shape[1:])]
    return {"type": "array", "prefixItems": sizes, "items": False, "minItems": len(shape)}


def _prediction(tensor: Tensor, labels: tuple[str, ...] | None) -> Schema:
    # NaN and infinity are written as null.
    value = element(tensor.dtype, nullable=tensor.dtype in FLOATS)
    row_shape = () if tensor.shape[1:] == (1,) else tensor.shape[1:]
    per_class = labels is not None and row_shape == (len(labels),) and len(set(labels)) == len(labels)
    return {"type": "object", "additionalProperties": value} if per_class else _nested(value, row_shape)


def _nested(value: Schema, row_shape: tuple[int, ...]) -> Schema:
    if math.prod(abs(size) for size in row_shape) > _MAX_SPELLED_ELEMENTS:
        return {"type": "array"}
    for size in reversed(row_shape):
        sizes = {"minItems": 1} if size == -1 else {"minItems": size, "maxItems": size}
        value = {"type": "array", "items": value, **sizes}
    return value


def _closed(properties: Schema, optional: tuple[str, ...] = ()) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }
