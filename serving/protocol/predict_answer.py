"""Writes what a person reads: one object a row, with the outputs by name.

Where the model has class names, an output with one value for each is an object of them:
`{"label": "7", "probabilities": {"0": 0.01, ...}}`. Numbers are written as short as their type allows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from cluster.signature import Signature
from serving.protocol.oip_answer import text_of
from serving.protocol.requests import Arrays


def render(outputs: Arrays, *, model: str, version: str, signature: Signature) -> bytes:
    """Write a predict answer; see `Codec.render_predict`."""
    columns: dict[str, list[Any]] = {}
    for tensor in signature.outputs:
        array = np.ascontiguousarray(outputs[tensor.name])
        if array.shape[1:] == (1,):
            array = array[:, 0]
        if tensor.dtype == "BYTES":
            columns[tensor.name] = _texts(array.tolist())
        elif _is_per_class(array.shape, signature.labels):
            assert signature.labels is not None
            columns[tensor.name] = [dict(zip(signature.labels, row, strict=True)) for row in array]
        else:
            columns[tensor.name] = list(array)
    names = list(columns)
    predictions = [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    document = {"model": model, "version": version, "predictions": predictions}
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def _is_per_class(shape: tuple[int, ...], labels: tuple[str, ...] | None) -> bool:
    return labels is not None and shape[1:] == (len(labels),) and len(set(labels)) == len(labels)


def _texts(value: Any) -> Any:
    return [_texts(item) for item in value] if isinstance(value, list) else text_of(value)
