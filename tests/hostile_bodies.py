"""Bodies that are not what a model takes: JSON, binary tensors and images, broken in every way."""

from __future__ import annotations

import base64
import copy
import random
import struct
import zlib
from typing import Any

from hostile import Attack, Target, dumped, request

_LENGTH = "inference-header-content-length"
_LARGE_BYTES = 100_000

_STRANGE: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    -(2**63),
    10**400,
    0.5,
    -0.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "x",
    "\0",
    "NaN",
    "\ud800",
    "é" * 50,
    "a" * 5000,
    "../../etc",
    [],
    {},
    [[]],
    [{}],
    [None],
    [[1], [2, 3]],
    {"": None},
    {"b64": ""},
    {"b64": "!"},
    [0] * 5000,
    "x",
    "age",
    "FP16",
    "FP32",
    "FP64",
    "INT64",
    "BYTES",
    "BOOL",
    "UINT8",
    "FP8",
    {"binary_data_size": 4},
    {"binary_data": 1},
    *([-1, 64], [2**40, 2**40], [2**63, 2], [0, 64], [1] * 100, [1, 64, 1], [1.0, 64], ["1", 64], [True, 64]),
)


def _nodes(node: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [here, *(path for key, child in items for path in _nodes(child, (*here, key)))]


def _changed(dice: random.Random, document: Any) -> Any:
    """With one node replaced, taken out, repeated or renamed."""
    result = copy.deepcopy(document)
    nodes = _nodes(result)[1:]
    if not nodes:
        return result
    path = min(dice.choice(nodes), dice.choice(nodes), key=len)  # rather a node near the top
    parent = result
    for key in path[:-1]:
        parent = parent[key]
    action = dice.random()
    if action < 0.7:
        parent[path[-1]] = dice.choice(_STRANGE)
    elif action < 0.8:
        del parent[path[-1]]
    elif isinstance(parent, list):
        parent.extend([parent[path[-1]]] * dice.choice((1, 2, 5000)))
    else:
        parent[dice.choice(("", "id", "inputs", "parameters", "x" * 300))] = parent.pop(path[-1])
    return result


def mangled(dice: random.Random, document: Any) -> bytes:
    """JSON, or nearly."""
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        document = _changed(dice, document)
        text = dumped(document)
        if len(text) > _LARGE_BYTES:  # repeated again it would take minutes to make
            break
    luck = dice.random()
    if luck < 0.08:
        depth = dice.choice((100, 1023, 1025, 100_000))
        return dice.choice((b"[" * depth, b'{"instances":' * depth, b"[" * depth + b"]" * depth))
    if luck < 0.14:
        at = dice.randrange(len(text) + 1)
        return (
            text[:at]
            + dice.choice((b"\xff", b"\x00", b"\xed\xa0\x80", b"1e999", b"NaN", b"/*", b"\\u00"))
            + text[at:]
        )
    if luck < 0.18:
        return dice.choice((b"\xef\xbb\xbf", b"\xff\xfe", b" " * 70_000)) + text
    if luck < 0.22:
        return text[: dice.randrange(len(text) + 1)]
    if luck < 0.25:
        return text[:-1] + b"," + text[1:]  # every name twice
    return text


_TYPES = (
    "application/json",
    "",
    "text/html",
    "application/octet-stream",
    "image/png",
    "multipart/form-data",
    "a" * 900,
)


def json_body(dice: random.Random, target: Target, headers: list[str]) -> Attack:
    """JSON that is nearly right, under a content type and an encoding that may lie."""
    infer = dice.random() < 0.5
    path = f"/v2/models/{target.name}/infer" if infer else f"/v1/models/{target.name}:predict"
    body = mangled(dice, target.infer if infer else target.predict)
    if dice.random() < 0.05:
        path, body = f"/v1/models/{target.name}:feedback", mangled(dice, {"version": "1", "score": 1})
    if dice.random() < 0.3:
        headers = [*headers, f"content-type: {dice.choice(_TYPES)}"]
    if dice.random() < 0.05:
        headers = [*headers, f"content-encoding: {dice.choice(('gzip', 'br', 'identity', 'x'))}"]
        body = zlib.compress(body)
    return Attack("JSON", (request("POST", path, headers, body),))


def binary(dice: random.Random, target: Target, headers: list[str]) -> Attack:
    """Binary tensors whose sizes, types and shapes may not fit each other, or anything."""
    document = copy.deepcopy(target.infer)
    tail = b""
    for tensor in document["inputs"]:
        del tensor["data"]
        size = dice.choice((256, 256, 4, 0, 8, 255, dice.randrange(2000)))
        raw = dice.choice((bytes(size), dice.randbytes(size), struct.pack("<f", float("nan")) * (size // 4)))
        if dice.random() < 0.2:  # lengths of strings that lie
            raw = struct.pack("<I", dice.choice((0, 1, 2**31, 2**32 - 1))) + raw
        told = dice.choice((len(raw),) * 5 + (len(raw) + 1, -1, 0, 2**63, 2**64, 10**30, "4", 1.5, None))
        tensor["parameters"] = {"binary_data_size": told}
        if dice.random() < 0.3:
            tensor["shape"] = dice.choice(
                ([1, 64], [2**32, 2**32], [2**62, 4], [-1, 64], [64], [], [1] * 60, [0], None)
            )
        if dice.random() < 0.3:
            tensor["datatype"] = dice.choice(("FP16", "FP64", "BYTES", "BOOL", "INT64", "UINT8", "float", 7))
        tail += raw
    if dice.random() < 0.2:
        document["outputs"] = [
            {"name": dice.choice(("label", "value", "y")), "parameters": {"binary_data": True}}
        ]
    text = mangled(dice, document) if dice.random() < 0.3 else dumped(document)
    lies = (len(text),) * 6 + (
        0,
        1,
        len(text) + 1,
        len(text) + len(tail) + 1,
        -1,
        2**64,
        "9" * 5000,
        "0x10",
        "٣",
        " ",
        "",
    )
    length = dice.choice(lies)
    named = [f"{_LENGTH}: {length}".encode().decode("latin-1")]
    if dice.random() < 0.05:
        named.append(f"{_LENGTH}: 1")
    path = f"/v2/models/{target.name}/infer"
    return Attack("binary", (request("POST", path, [*headers, *named], text + tail),))


def image(dice: random.Random, target: Target, headers: list[str]) -> Attack:
    """Files that are no images, are cut off, or are small and say that they are huge."""
    side = dice.choice((1, 8, 60_000, 2**31 - 1, 0))
    picture = png(side, side, rows=min(side, 8))
    luck = dice.random()
    if luck < 0.3:
        picture = picture[: dice.randrange(len(picture))]
    elif luck < 0.6:
        at = dice.randrange(len(picture))
        picture = picture[:at] + dice.randbytes(dice.randrange(1, 9)) + picture[at + 1 :]
    elif luck < 0.7:
        picture = dice.choice(
            (b"\xff\xd8\xff", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"II*\0", b"<svg/>", b"%PDF")
        ) + dice.randbytes(50)
    path = f"/v1/models/{target.name}:predict"
    if dice.random() < 0.5:
        kind = dice.choice(("image/png", "image/jpeg", "application/octet-stream", "", "image/svg+xml"))
        return Attack("image", (request("POST", path, [*headers, f"content-type: {kind}"], picture),))
    body = {"instances": [{"b64": base64.b64encode(picture).decode()}] * dice.choice((1, 1, 3))}
    return Attack("image", (request("POST", path, headers, dumped(body)),))


def png(width: int, height: int, *, rows: int) -> bytes:
    """A grey PNG that says it has `height` rows and has `rows`."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes((min(width, 100_000) + 1) * rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
