"""W3C Trace Context: what a caller says of the trace that its request belongs to.

A `traceparent` that can't be understood is dropped together with its `tracestate`, as the recommendation
asks, and a new trace begins; a bad `tracestate` alone is dropped alone. The recommendation has no response
header, so none is sent. Knows nothing of spans.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

TRACEPARENT, TRACESTATE = b"traceparent", b"tracestate"
MAX_STATE_CHARS = 512
MAX_STATE_MEMBERS = 32
_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_KEY = r"[a-z][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13}"
_MEMBER = re.compile(rf"(?P<key>{_KEY})=[\x20-\x2b\x2d-\x3c\x3e-\x7e]{{0,255}}[\x21-\x2b\x2d-\x3c\x3e-\x7e]")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """Where a request stands in its trace. Ids are lower-case hex."""

    trace_id: str
    parent_id: str
    flags: int = 0
    state: str = ""

    @property
    def sampled(self) -> bool:
        """Whether the caller records its part of the trace."""
        return bool(self.flags & 1)

    def headers(self) -> dict[bytes, bytes]:
        """As they are sent on."""
        parent = f"00-{self.trace_id}-{self.parent_id}-{self.flags:02x}".encode()
        return {TRACEPARENT: parent} | ({TRACESTATE: self.state.encode()} if self.state else {})


def read(headers: Mapping[bytes, bytes]) -> TraceContext | None:
    """The context that a request came with; None where it has none, or a malformed one."""
    given = headers.get(TRACEPARENT)
    if given is None or (found := _PARENT.fullmatch(given)) is None:
        return None
    version, trace_id, parent_id, flags, more = found.groups()
    if version == b"ff" or (version == b"00" and more):
        return None
    if not trace_id.strip(b"0") or not parent_id.strip(b"0"):
        return None
    # Of the flags, those that this version of the standard knows: recorded, and random.
    known = int(flags, 16) & 3
    return TraceContext(trace_id.decode(), parent_id.decode(), known, _state(headers.get(TRACESTATE, b"")))


def begin() -> TraceContext:
    """A trace of our own, not sampled."""
    return TraceContext(secrets.token_hex(16), secrets.token_hex(8))


def onward(headers: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """The headers with which a request is passed on: a malformed context becomes a new one."""
    if TRACEPARENT not in headers and TRACESTATE not in headers:
        return dict(headers)
    others = {name: value for name, value in headers.items() if name not in (TRACEPARENT, TRACESTATE)}
    if TRACEPARENT not in headers:
        return others  # a state without a parent means nothing
    return others | (read(headers) or begin()).headers()


def _state(given: bytes) -> str:
    """The members of a `tracestate`, or nothing where one of them is malformed or there are too many."""
    text = given.decode("latin-1")
    if len(text) > MAX_STATE_CHARS:
        return ""
    members = [member.strip(" \t") for member in text.split(",") if member.strip(" \t")]
    matches = [_MEMBER.fullmatch(member) for member in members]
    keys = [match.group("key") for match in matches if match is not None]
    if len(members) > MAX_STATE_MEMBERS or len(keys) < len(members) or len(set(keys)) < len(keys):
        return ""
    return ",".join(members)
