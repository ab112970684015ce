"""Writes the Open Inference Protocol v2's answer, JSON or with binary tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson

from cluster.signature import NUMPY_DTYPES, Signature, Tensor
from serving.protocol.requests import HEADER_LENGTH, Array, Arrays, Headers, InferRequest, OutputSpec


def render(
    outputs: Arrays, *, request: InferRequest, model: str, version: str, signature: Signature
) -> tuple[bytes, Headers]:
    """Write an infer answer; see `Codec.render_oip`."""
    specs = request.outputs or [OutputSpec(tensor.name) for tensor in signature.outputs]
    tensors = {tensor.name: tensor for tensor in signature.outputs}
    rendered: list[dict[str, Any]] = []
    chunks: list[bytes] = []
    for spec in specs:
        tensor, array = tensors[spec.name], outputs[spec.name]
        entry: dict[str, Any] = {"name": spec.name, "datatype": tensor.dtype, "shape": array.shape}
        if spec.binary:
            chunks.append(_to_binary(array, tensor))
            entry["parameters"] = {"binary_data_size": len(chunks[-1])}
        else:
            entry["data"] = as_json(array, tensor)
        rendered.append(entry)
    document: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": rendered}
    if request.request_id is not None:
        document["id"] = request.request_id
    text = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if not chunks:
        return text, [(b"content-type", b"application/json")]
    headers = [(b"content-type", b"application/octet-stream"), (HEADER_LENGTH, str(len(text)).encode())]
    return b"".join([text, *chunks]), headers


def as_json(array: Array, tensor: Tensor) -> Any:
    """`array` flattened, row-major, fit for orjson with OPT_SERIALIZE_NUMPY (which writes NaN as null)."""
    flat = array.reshape(-1)
    if tensor.dtype == "BYTES":
        return [text_of(element) for element in flat.tolist()]
    return np.ascontiguousarray(flat, NUMPY_DTYPES[tensor.dtype])


def text_of(element: Any) -> str:
    return element if isinstance(element, str) else bytes(element).decode("utf-8", "replace")


def _to_binary(array: Array, tensor: Tensor) -> bytes:
    if tensor.dtype != "BYTES":
        return array.astype(np.dtype(NUMPY_DTYPES[tensor.dtype]).newbyteorder("<"), copy=False).tobytes()
    elements = [text_of(element).encode() for element in array.reshape(-1).tolist()]
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)
