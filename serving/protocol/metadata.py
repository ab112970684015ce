"""What the server and its models say of themselves, in the Open Inference Protocol's form."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import orjson

from cluster.signature import Signature, Tensor

SERVER_NAME = "tandem"
EXTENSIONS = ("binary_tensor_data",)


def server_metadata() -> bytes:
    """The answer to `GET /v2`: name, version and extensions."""
    return orjson.dumps(
        {"name": SERVER_NAME, "version": version("tandem-ray"), "extensions": list(EXTENSIONS)}
    )


def model_metadata(name: str, versions: Sequence[str], signature: Signature, platform: str) -> bytes:
    """The answer to `GET /v2/models/{name}`.

    An image input is shown as callers mostly send it, BYTES [-1] with an encoded file a row; its
    parameters say what else it takes. Class names are in `parameters.labels`, in the order of the outputs.
    """
    document: dict[str, Any] = {
        "name": name,
        "versions": list(versions),
        "platform": platform,
        "inputs": [_shown_input(tensor) for tensor in signature.inputs],
        "outputs": [_shown(tensor) for tensor in signature.outputs],
    }
    if signature.labels is not None:
        document["parameters"] = {"labels": signature.labels}
    return orjson.dumps(document)


def _shown(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "datatype": tensor.dtype, "shape": tensor.shape}


def _shown_input(tensor: Tensor) -> dict[str, Any]:
    image = tensor.encoding
    if image is None:
        return _shown(tensor) | ({"parameters": {"nullable": True}} if tensor.nullable else {})
    parameters = {
        "content": "image/png or image/jpeg; base64 in JSON",
        "height": image.height,
        "width": image.width,
        "channels": image.channels,
        "also_takes": f"UINT8 {list(tensor.shape)}",
    }
    return {"name": tensor.name, "datatype": "BYTES", "shape": [-1], "parameters": parameters}
