"""A request as the batcher sees it: checked arrays, whatever protocol they came by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = dict[str, Array]
Headers = list[tuple[bytes, bytes]]
"""Response headers as ASGI wants them: lower-case names."""
Parameters = Mapping[str, str | int | float | bool | None]


HEADER_LENGTH = b"inference-header-content-length"
"""The header that says how many bytes of JSON lead a body with binary tensors."""


@dataclass(frozen=True, slots=True)
class OutputSpec:
    """An output that the client asked for, as binary or as JSON."""

    name: str
    binary: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class InferRequest:
    """One request, wholly validated.

    `inputs` has every input of the signature, by name: axis 0 is `rows`, the dtype is
    `cluster.signature.NUMPY_DTYPES`' (BYTES: an object array of str; images: decoded, uint8 [rows, height,
    width, channels]). Arrays may be read-only views of the request's body. `outputs` empty means all, as
    JSON.
    """

    inputs: Arrays
    rows: int
    request_id: str | None = None
    outputs: tuple[OutputSpec, ...] = ()
    parameters: Parameters = field(default_factory=dict)
