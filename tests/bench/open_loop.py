"""Open-loop load over HTTP/1.1: requests go out when they are due, whatever became of those before.

Each is timed from when it was to be sent, so a server that holds up the sender is charged for it. Keep-alive
connections are used again, and another is opened where none is free.
"""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

GRACE_S = 1.0
LEAD_S = 0.3


@dataclass(frozen=True, slots=True)
class Planned:
    """A request to be sent `at_s` after the start, of use only `within_s` of that."""

    at_s: float
    within_s: float
    length: int = 0


@dataclass(slots=True)
class Sent:
    """What became of it."""

    planned: Planned
    status: int = 0
    """0: no answer while anyone waited."""
    latency_s: float = math.inf
    text: bytes = b""
    """Of an answer that isn't 200."""
    head: bytes = b""
    """Its status line and headers."""

    @property
    def in_time(self) -> bool:
        """Whether it was answered, and soon enough."""
        return self.status == 200 and self.latency_s <= self.planned.within_s


Render = Callable[[Planned, float], bytes]
"""From a request and the time it is due on the monotonic clock to the whole HTTP request."""


def http_post(path: str, body: bytes, *headers: str) -> bytes:
    """A whole request."""
    lines = [f"POST {path} HTTP/1.1", "host: bench", f"content-length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def drive(port: int, requests: Sequence[Planned], render: Render) -> list[Sent]:
    """Send them all, and wait for the answers while they may still be of use."""
    gc.collect()
    gc.disable()  # a collection in the sender would be taken for latency
    try:
        return asyncio.run(_drive(port, requests, render))
    finally:
        gc.enable()


async def _drive(port: int, requests: Sequence[Planned], render: Render) -> list[Sent]:
    loop = asyncio.get_running_loop()
    free: list[_Connection] = []
    started_s = time.monotonic() + LEAD_S
    answers = []
    for planned in requests:
        await asyncio.sleep(max(0.0, started_s + planned.at_s - time.monotonic()))
        answers.append(loop.create_task(_ask(port, planned, started_s + planned.at_s, render, free)))
    found = [await answer for answer in answers]
    for connection in free:
        connection.close()
    return found


async def _ask(port: int, planned: Planned, at_s: float, render: Render, free: list[_Connection]) -> Sent:
    sent = Sent(planned)
    connection = None
    try:
        async with asyncio.timeout_at(at_s + planned.within_s + GRACE_S):
            connection = free.pop() if free else await _connect(port)
            sent.head, text = await connection.ask(render(planned, at_s + planned.within_s))
            sent.latency_s = time.monotonic() - at_s
            sent.status = int(sent.head[9:12])
            if sent.status != 200:
                sent.text = text
    except (TimeoutError, OSError):
        pass
    if connection is not None:
        if sent.status and not connection.closing:
            free.append(connection)
        else:
            connection.close()
    return sent


async def _connect(port: int) -> _Connection:
    _, connection = await asyncio.get_running_loop().create_connection(_Connection, "127.0.0.1", port)
    return connection


class _Connection(asyncio.Protocol):
    """One connection with one request at a time; answers have a content-length or come in chunks."""

    def __init__(self) -> None:
        self.closing = False
        self._received = b""
        self._answer: asyncio.Future[tuple[bytes, bytes]] | None = None

    async def ask(self, request: bytes) -> tuple[bytes, bytes]:
        """The head of the answer and its body."""
        self._answer = asyncio.get_running_loop().create_future()
        assert isinstance(self._transport, asyncio.Transport)
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, rest = self._received.partition(b"\r\n\r\n")
        if not found:
            return
        headers = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
        if headers.get(b"transfer-encoding", b"").strip() == b"chunked":
            whole = rest.endswith(b"0\r\n\r\n")
        else:
            whole = len(rest) >= int(headers.get(b"content-length", b"0"))
        if whole and self._answer is not None and not self._answer.done():
            self.closing = headers.get(b"connection", b"").strip() == b"close"
            self._received = b""
            self._answer.set_result((head, rest))

    def connection_lost(self, error: Exception | None) -> None:
        self.closing = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError("closed"))
