"""How much one request may hold. Everything is checked before memory is taken for it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The caps on one request.

    There is no cap on JSON nesting: the parser stops at 1024 levels by itself, and a reader goes only
    as deep as the signature's tensors, so what is nested deeper is refused as a wrong shape.
    """

    max_body_bytes: int = 64 * 1024 * 1024
    max_rows: int = 4096
    max_objects: int = 2_000_000
    """Values in a JSON body, or strings in a tensor: what takes some 100 bytes each while it is read."""
    max_tensor_elements: int = 64_000_000
    max_image_pixels: int = 256_000_000
    """Pixels of all encoded images of a request together, shared evenly among them."""
    max_id_chars: int = 256
