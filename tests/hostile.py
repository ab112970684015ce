"""Hostile clients of a service, over real sockets: an attack, what came back, and what must never come back.

Nothing here knows how the service works, only what HTTP looks like. The attacks themselves are made in
`hostile_bodies` and `hostile_heads`, and mixed in `hostile_mix`.
"""

from __future__ import annotations

import json
import random
import re
import socket
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

ANSWER_WITHIN_S = 20.0
PATIENCE_S = 1.0
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
_NEVER = re.compile(rb"Traceback|File \"|site-packages|\.py\b|line \d+, in|/tmp/|ray::")
_REFUSALS_5XX = {501, 505}
"""What HTTP itself says to a transfer coding or a version that nobody knows."""

Ending = Literal["await", "half-close", "close", "reset"]


@dataclass(frozen=True)
class Target:
    """A model to attack, and a good request for it in both protocols."""

    name: str
    infer: dict[str, Any]
    predict: dict[str, Any]


@dataclass(frozen=True)
class Attack:
    """What a client sends, in pieces with a pause between, and how it ends."""

    what: str
    pieces: tuple[bytes, ...]
    ending: Ending = "await"
    pause_s: float = 0.0


@dataclass(frozen=True)
class Seen:
    """What came back."""

    raw: bytes
    ended: bool
    """Whether the service closed the connection, or we did, before the deadline."""
    waited: bool
    """Whether all was sent and we were still ready to send more when it ended."""

    @property
    def statuses(self) -> list[int]:
        """Of every answer, those on the way (1xx) left out."""
        return [int(found) for found in _STATUS.findall(self.raw) if not found.startswith(b"1")]


def strike(port: int, attack: Attack, within_s: float = ANSWER_WITHIN_S) -> Seen:
    """Carry an attack out.

    What was sent may be less than the service waits for; so when it is silent for `PATIENCE_S`, we say that
    no more will come.
    """
    raw = bytearray()
    began_s = time.monotonic()
    waiting = attack.ending == "await"
    with socket.create_connection(("127.0.0.1", port), timeout=within_s) as connection:
        try:
            for number, piece in enumerate(attack.pieces):
                if number:
                    time.sleep(attack.pause_s)
                connection.sendall(piece)
            if attack.ending == "half-close":
                connection.shutdown(socket.SHUT_WR)
            elif attack.ending == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if attack.ending in ("close", "reset"):
                return Seen(b"", ended=True, waited=False)
            while (left_s := began_s + within_s - time.monotonic()) > 0:
                connection.settimeout(min(PATIENCE_S, left_s) if waiting else left_s)
                try:
                    chunk = connection.recv(65536)
                except TimeoutError:
                    waiting = False
                    connection.shutdown(socket.SHUT_WR)
                    continue
                if not chunk:
                    return Seen(bytes(raw), ended=True, waited=waiting)
                raw += chunk
        except OSError:  # it wouldn't have any more of this
            return Seen(bytes(raw), ended=True, waited=False)
    return Seen(bytes(raw), ended=False, waited=False)


def complaints(attack: Attack, seen: Seen, *, overload: bool = False) -> list[str]:
    """What the service did that it must not.

    Args:
        overload: whether 503 and 504 are in order.
    """
    found = []
    allowed_5xx = _REFUSALS_5XX | ({503, 504} if overload else set())
    found += [f"answered {status}" for status in seen.statuses if status >= 500 and status not in allowed_5xx]
    if told := _NEVER.search(seen.raw):
        found.append(f"told of its inside: {told.group()!r}")
    if not seen.ended and not seen.statuses:
        found.append("neither answered nor closed")
    elif seen.waited and not seen.raw:
        found.append("closed without a word")
    sent, came = b"".join(attack.pieces), seen.raw
    return [f"{attack.what}: {one}; sent {sent[:400]!r}, got {came[:400]!r}" for one in found]


def good(target: Target, key: str = "") -> bytes:
    """A request that must be answered, and as ever."""
    return request("POST", f"/v1/models/{target.name}:predict", common(None, key), dumped(target.predict))


def common(dice: random.Random | None, key: str) -> list[str]:
    """Headers of (almost) every request; `connection: close`, so that the end of the answer is seen."""
    headers = ["host: x", "connection: close"]
    if key and (dice is None or dice.random() < 0.95):
        headers.append(f"authorization: Bearer {key}")
    return headers


def request(
    method: str, path: str, headers: Sequence[str], body: bytes = b"", *, measured: bool = True
) -> bytes:
    """A request as it goes over the wire; `measured`: with the length that its body has."""
    lines = [f"{method} {path} HTTP/1.1", *headers]
    if measured:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def dumped(document: Any) -> bytes:
    """JSON as Python writes it, which has NaN and Infinity."""
    return json.dumps(document).encode()
