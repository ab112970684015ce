"""Reads what a person types: `{"instances": [...]}`, or an image file as the body.

An instance is an object of input names and values or, where the model has one input, the bare value. A
nullable input may be null or left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cluster.errors import TooLarge, Unprocessable, UnsupportedMedia
from serving.protocol.limits import Limits
from serving.protocol.reading import (
    as_list,
    as_object,
    brief,
    check_body_size,
    listed,
    near,
    read_json,
)
from serving.protocol.requests import InferRequest
from serving.protocol.tensors import TensorReader, no_rows

_JSON_TYPES = ("application/json", "text/json", "text/plain")
_IMAGE_TYPES = ("image/png", "image/jpeg")
# What curl -d and --data-binary say when nobody tells them, and what an unknown file is.
_UNTOLD_TYPES = ("", "application/x-www-form-urlencoded", "application/octet-stream")
_IMAGE_MARKS = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_ABSENT = object()


def parse(
    body: bytes, content_type: str, readers: Mapping[str, TensorReader], limits: Limits
) -> InferRequest:
    """Read a predict request; see `Codec.parse_predict`."""
    check_body_size(body, limits)
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type in _IMAGE_TYPES or (media_type in _UNTOLD_TYPES and body.startswith(_IMAGE_MARKS)):
        return _parse_image(body, readers)
    if media_type not in _JSON_TYPES and media_type not in _UNTOLD_TYPES:
        raise UnsupportedMedia(
            "this content type is not taken",
            got=brief(content_type),
            allowed=" or ".join((_JSON_TYPES[0], *_IMAGE_TYPES)),
            fix="set the header Content-Type to what the body is",
        )
    document = as_object(read_json(body, limits), "the request", ("instances",), ())
    instances = as_list(document["instances"], "'instances'")
    if not instances:
        raise no_rows("'instances'")
    _check_size(len(instances), len(readers), limits)
    if len(readers) == 1 and not _names_input(instances[0], readers):
        (reader,) = readers.values()
        return InferRequest(inputs={reader.name: reader.from_rows(instances)}, rows=len(instances))
    _check_instances(instances, readers)
    inputs = {reader.name: _column(instances, reader) for reader in readers.values()}
    return InferRequest(inputs=inputs, rows=len(instances))


def _check_size(rows: int, inputs: int, limits: Limits) -> None:
    if rows > limits.max_rows:
        raise TooLarge(
            "there are too many instances",
            got=f"{rows} instances",
            allowed=f"at most {limits.max_rows}",
            fix="send them in several requests",
        )
    # An instance that leaves out what it may costs as much as one that doesn't.
    if rows * inputs > limits.max_objects:
        raise TooLarge(
            "there are too many values",
            got=f"{rows} instances of {inputs} inputs",
            allowed=f"at most {limits.max_objects} values",
            fix="send them in several requests",
        )


def _parse_image(body: bytes, readers: Mapping[str, TensorReader]) -> InferRequest:
    """One image file for the model's one image input; its other inputs must be such as may be missing."""
    images = [reader for reader in readers.values() if reader.tensor.encoding is not None]
    if len(images) == 1:
        inputs = {reader.name: reader.missing(1) for reader in readers.values() if reader is not images[0]}
        found = {name: array for name, array in inputs.items() if array is not None}
        if len(found) == len(inputs):
            return InferRequest(inputs={images[0].name: images[0].from_file(body), **found}, rows=1)
    raise Unprocessable(
        "the model does not take an image as the body",
        got=f"an image of {len(body)} bytes",
        allowed=f"JSON with instances of {listed(readers)}",
        fix='send {"instances": [...]} as application/json',
    )


def _names_input(instance: Any, readers: Mapping[str, TensorReader]) -> bool:
    """Whether an instance of a single-input model is an object of names rather than the bare value."""
    if type(instance) is not dict:
        return False
    (reader,) = readers.values()
    is_bare_image = reader.tensor.encoding is not None and instance.keys() == {"b64"}
    return reader.name in instance or not is_bare_image


def _check_instances(instances: Sequence[Any], readers: Mapping[str, TensorReader]) -> None:
    names = readers.keys()
    for row, instance in enumerate(instances):
        if type(instance) is not dict:
            raise Unprocessable(
                f"instance {row} is not an object",
                got=brief(instance),
                allowed=f"an object with {listed(names)}",
                fix="give each value its input's name",
            )
        if instance.keys() != names:
            unknown = next((key for key in instance if key not in names), None)
            if unknown is not None:
                raise Unprocessable(
                    f"instance {row} has an input that the model does not have",
                    got=brief(unknown),
                    allowed=listed(names),
                    fix=near(unknown, names),
                )


def _column(instances: Sequence[dict[str, Any]], reader: TensorReader) -> Any:
    """One input's values of all instances, as an array."""
    name, nullable = reader.name, reader.tensor.nullable
    values = [instance.get(name, None if nullable else _ABSENT) for instance in instances]
    if not nullable and _ABSENT in values:
        raise Unprocessable(
            f"instance {values.index(_ABSENT)} lacks {reader.what}",
            got=listed(instances[values.index(_ABSENT)]) or "no input",
            allowed=f"an object with {brief(name)}",
            fix=f"add {brief(name)}; the model takes no missing values there",
        )
    return reader.from_rows(values)
