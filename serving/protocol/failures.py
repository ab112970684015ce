"""From an exception to the answer a client gets: one JSON form for every error of every route.

What the client did, or can act on, is explained in full. Anything else is ours: the client gets its
status and the request's id, under which the log has the rest, and never a path, a key or a stack trace.
"""

from __future__ import annotations

import math

import orjson

from cluster.errors import (
    BadInput,
    DeadlineExceeded,
    NotReady,
    Overloaded,
    RateLimited,
    TandemError,
    Unauthorized,
)
from serving.protocol.requests import Headers

_EXPLAINED = (BadInput, Overloaded, NotReady, RateLimited, DeadlineExceeded)
_GENERIC = "the server failed; its log has the cause under this request's id"


def render_error(error: Exception, request_id: str) -> tuple[int, bytes, Headers]:
    """Status, body and headers for `error`.

    The body is `{"error": str, "details": {failed, got, allowed, fix}, "request_id": str}`; `details` is
    there only for errors that are explained. `retry-after` is in whole seconds, at least 1.
    """
    status = error.http_status if isinstance(error, TandemError) else 500
    headers: Headers = [(b"content-type", b"application/json")]
    retry_after_s: float | None = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(retry_after_s))).encode()))
    if isinstance(error, Unauthorized):
        headers.append((b"www-authenticate", b'Bearer realm="tandem"'))
    if not isinstance(error, _EXPLAINED):
        return status, orjson.dumps({"error": _GENERIC, "request_id": request_id}), headers
    body = {"error": _one_line(error), "details": error.parts(), "request_id": request_id}
    return status, orjson.dumps(body), headers


def _one_line(error: TandemError) -> str:
    parts = error.parts()
    told = [parts["failed"]]
    told += [f"{name}: {parts[name]}" for name in ("got", "allowed", "fix") if name in parts]
    return "; ".join(told)
