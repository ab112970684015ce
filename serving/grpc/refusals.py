"""From an HTTP answer that refuses to the status, details and metadata that a gRPC client gets.

The details are the answer's own `error`: the four parts on one line, never a stack trace. Metadata says
under which id the log has the rest, and, where a retry makes sense, when: `retry-after` in seconds, and
`grpc-retry-pushback-ms`, which gRPC's own retries obey.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import grpc
import orjson

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.UNIMPLEMENTED,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    409: grpc.StatusCode.ABORTED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,  # as gRPC itself refuses a message that is too large
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_MAX_DETAILS_CHARS = 2000
"""A client takes 8 KiB of metadata, and each character may be written as nine."""
_NO_REPLICA = "no replica answered; fix: try again, and look at the server's log if it lasts"

Metadata = tuple[tuple[str, str], ...]


class Answer(NamedTuple):
    """What HTTP answered. Header names are lower-case."""

    status: int
    headers: Mapping[bytes, bytes]
    body: bytes


class Refused(Exception):
    """A call ends with a status other than OK."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: Metadata) -> None:
        super().__init__(details)
        self.code = code
        self.details = details
        self.metadata = metadata


def metadata_of(answer: Answer, request_id: str) -> Metadata:
    """What a client is told beside the message: the request's id, the version, when to retry."""
    found = [("x-request-id", request_id)]
    for name in (b"x-model-version", b"retry-after"):
        if (value := answer.headers.get(name)) is not None:
            found.append((name.decode(), value.decode("latin-1")))
    retry_after = answer.headers.get(b"retry-after", b"")
    if retry_after.isdigit():
        found.append(("grpc-retry-pushback-ms", str(int(retry_after) * 1000)))
    return tuple(found)


def refused(answer: Answer, request_id: str) -> Refused:
    """What to end a call with for an answer other than 200."""
    metadata = metadata_of(answer, request_id)
    told = _told(answer.body)
    if told is None:
        # The ingress answered in its own words: no replica was there, or it went away while it worked.
        return Refused(grpc.StatusCode.UNAVAILABLE, _NO_REPLICA, metadata)
    code = _CODES.get(answer.status, grpc.StatusCode.INTERNAL)
    return Refused(code, told[:_MAX_DETAILS_CHARS], metadata)


def _told(body: bytes) -> str | None:
    """The `error` of an answer in the form that all of ours have."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    error = document.get("error") if isinstance(document, dict) else None
    return error if isinstance(error, str) else None
