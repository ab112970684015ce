"""One good request for a model, to paste and to start from: a row of plain values."""

from __future__ import annotations

import math
from typing import Any

from cluster.signature import Signature, Tensor
from serving.protocol.scalars import FLOATS

_MAX_ELEMENTS = 1024


def predict_example(signature: Signature) -> dict[str, Any] | None:
    """A body for predict; None if it would be too long to show."""
    if not _is_short(signature):
        return None
    row = {tensor.name: _nested(_value(tensor), _row_shape(tensor)) for tensor in signature.inputs}
    return {"instances": [row]}


def infer_example(signature: Signature) -> dict[str, Any] | None:
    """A JSON body for infer; None if it would be too long to show, or the model takes none."""
    if not _is_short(signature) or any(tensor.dtype == "FP16" for tensor in signature.inputs):
        return None
    inputs = []
    for tensor in signature.inputs:
        shape = (1, *map(abs, tensor.shape[1:]))
        data = [_value(tensor)] * math.prod(shape)
        inputs.append({"name": tensor.name, "shape": list(shape), "datatype": tensor.dtype, "data": data})
    return {"inputs": inputs}


def _is_short(signature: Signature) -> bool:
    return sum(math.prod(map(abs, tensor.shape)) for tensor in signature.inputs) <= _MAX_ELEMENTS


def _row_shape(tensor: Tensor) -> tuple[int, ...]:
    shape = tensor.shape[1:]
    return () if shape == (1,) else tuple(map(abs, shape))


def _value(tensor: Tensor) -> Any:
    if tensor.dtype in FLOATS:
        return 0.5
    return {"BOOL": False, "BYTES": "text"}.get(tensor.dtype, 0)


def _nested(value: Any, row_shape: tuple[int, ...]) -> Any:
    for size in reversed(row_shape):
        value = [value] * size
    return value
