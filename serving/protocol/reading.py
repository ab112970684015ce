"""What every reader of a body needs: JSON within limits, checked keys, and values fit to show.

A fault in a request is a 400 if the request contradicts itself or its protocol, a 413 if it is over a
limit, and a 422 if it is sound but not what the model takes.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

import orjson

from cluster.errors import BadRequest, TooLarge, UnsupportedMedia
from serving.protocol.limits import Limits
from serving.protocol.requests import Parameters

_MAX_SHOWN_CHARS = 80
_MAX_COMPARED = 200
_SCALARS = (str, int, float, bool, type(None))


def brief(value: object) -> str:
    """A JSON value as a message may show it; never walks or copies a large one."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case str() if len(value) > _MAX_SHOWN_CHARS:
            return f"{value[:_MAX_SHOWN_CHARS]!r}… ({len(value)} characters)"
        case list():
            return f"a list of {len(value)}"
        case dict():
            return f"an object of {len(value)} keys"
        case _:
            return repr(value)


def near(name: str, names: Collection[str]) -> str:
    """What to do about an unknown `name`: the known ones most like it."""
    if len(name) <= _MAX_SHOWN_CHARS:
        matches = difflib.get_close_matches(name, list(names)[:_MAX_COMPARED], n=3)
        if matches:
            return "did you mean " + " or ".join(repr(match) for match in matches) + "?"
    return "see the model's metadata for its names"


def listed(names: Collection[str]) -> str:
    """Names as a message may list them: the first ten."""
    first = ", ".join(brief(name) for name in list(names)[:10])
    return first if len(names) <= 10 else f"{first} and {len(names) - 10} more"


def check_body_size(body: bytes | memoryview, limits: Limits) -> None:
    """Refuse a body over the limit. (The server stops reading there; this guards other callers.)"""
    if len(body) > limits.max_body_bytes:
        raise TooLarge(
            "the body is too large",
            got=f"{len(body)} bytes",
            allowed=f"at most {limits.max_body_bytes} bytes",
            fix="send fewer rows at once",
        )


def read_json(text: bytes, limits: Limits) -> Any:
    """The value that `text` holds.

    Raises:
        BadRequest: not JSON in UTF-8; NaN, Infinity and numbers beyond float64 aren't JSON either.
        TooLarge: more values than the limit. Commas are counted, which is quick and never too few.
    """
    if text.count(b",") >= limits.max_objects:
        raise TooLarge(
            "the JSON holds too many values",
            got=f"{text.count(b',') + 1} values or more",
            allowed=f"at most {limits.max_objects} values",
            fix="send fewer rows at once, or binary tensors (the Open Inference Protocol's binary extension)",
        )
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadRequest(
            "the body is not JSON",
            got=error.msg,
            allowed="JSON (RFC 8259) in UTF-8, nested at most 1024 deep, every number within float64",
            fix="write null for a missing value; JSON has no NaN or Infinity",
        ) from None


def as_object(value: Any, what: str, required: Collection[str], optional: Collection[str]) -> dict[str, Any]:
    """`value`, if it is an object with all of the required keys and no unknown one.

    Raises:
        BadRequest: it isn't.
    """
    if type(value) is not dict:
        raise BadRequest(
            f"{what} is not an object",
            got=brief(value),
            allowed=f"an object with {listed([*required, *optional])}",
            fix=f"send {what} as an object",
        )
    for key in value:
        if key not in required and key not in optional:
            known = [*required, *optional]
            raise BadRequest(
                f"{what} has an unknown key", got=brief(key), allowed=listed(known), fix=near(key, known)
            )
    for key in required:
        if key not in value:
            raise BadRequest(
                f"{what} lacks {key!r}",
                got=listed(value) or "no key",
                allowed=f"an object with {listed([*required, *optional])}",
                fix=f"add {key!r}",
            )
    return value


def as_list(value: Any, what: str) -> list[Any]:
    """`value`, if it is a list.

    Raises:
        BadRequest: it isn't.
    """
    if type(value) is not list:
        raise BadRequest(
            f"{what} is not a list", got=brief(value), allowed="a list", fix=f"send {what} as [...]"
        )
    return value


def as_parameters(value: Any, what: str) -> Parameters:
    """The protocol's parameters: an object of strings, numbers and booleans; null means none.

    Raises:
        BadRequest: anything else.
    """
    if value is None:
        return {}
    if type(value) is not dict or any(type(item) not in _SCALARS for item in value.values()):
        raise BadRequest(
            f"the parameters of {what} can't be read",
            got=brief(value),
            allowed="an object of strings, numbers and booleans",
            fix="leave out parameters that hold lists or objects",
        )
    return value


def refuse_encodings(headers: Mapping[bytes, bytes]) -> None:
    """Raises UnsupportedMedia for a body that is compressed."""
    encoding = headers.get(b"content-encoding", b"").strip().lower()
    if encoding not in (b"", b"identity"):
        raise UnsupportedMedia(
            "a compressed body is not taken",
            got=f"content-encoding {brief(encoding.decode('latin-1'))}",
            allowed="no content-encoding, or identity",
            fix="send the body as it is; binary tensors are smaller than JSON",
        )
