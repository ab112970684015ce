"""A proxy in front of a real S3 server that breaks what passes through it, as told, and counts it.

    with Seaweed() as server, FaultProxy(server.endpoint, seed=7) as proxy:
        proxy.arm(Fault(Kind.LOST_RESPONSE, method="PUT", key=r"manifest\\.json$"))
        ...                                                     # clients use proxy.endpoint
        assert proxy.counts[Kind.LOST_RESPONSE] == 1

It reads requests and responses as HTTP/1.1, so that a fault can aim at one kind of request and at
one byte of its body, and passes everything else on unchanged: signatures stay valid, because the
Host that a client signed is the proxy's own and travels on as it is. A request is hit by the first
armed fault that matches it, and by one only. Which requests a fault with a `share` hits follows from
the seed and the order of requests.

Runs in a thread with an event loop of its own, so that tests and their processes may block.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from types import TracebackType
from typing import Any, TypeVar

_PIECE_BYTES = 64 * 1024
_STARTED_WITHIN_S = 10
_TRICKLES_PER_S = 20
_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
_ENDS = b"\r\n\r\n"
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)

T = TypeVar("T")


class Kind(StrEnum):
    """What can go wrong with one request."""

    STATUS = "status"
    """The server answers with an error, having done nothing."""
    CUT_REQUEST = "cut request"
    """The connection is reset when `at_byte` bytes of the request's body have passed."""
    CUT_RESPONSE = "cut response"
    """The connection is closed when `at_byte` bytes of the response's body have passed."""
    SHORTEN = "shorten"
    """A well-formed response whose body ends at `at_byte`: no client can tell."""
    FLIP = "flip"
    """One bit of the response's body, in byte `at_byte`, is wrong: no client can tell."""
    TRICKLE = "trickle"
    """Bodies pass at `bytes_per_s`."""
    BLACK_HOLE = "black hole"
    """The request is taken, and nothing ever comes back."""
    LOST_RESPONSE = "lost response"
    """The server does what it was asked; the connection is reset before it can say so."""
    DELAY = "delay"
    """The request waits for `delay_s` before it is passed on."""
    HOLD_REQUEST = "hold request"
    """The request has come in whole, and waits for `release`; then it is passed on, whoever asked."""
    HOLD_BODY = "hold body"
    """The first `at_byte` bytes of the body are passed on, no more; reset by `release`."""
    HOLD_RESPONSE = "hold response"
    """The server has done what it was asked, and its answer waits for `release`."""


@dataclass(frozen=True)
class Fault:
    """One fault, and which requests it hits.

    Attributes:
        method: the HTTP method; empty for any.
        key: a pattern searched for in the path and query; empty for any.
        times: how many requests it hits; None for no limit.
        share: the share of matching requests that it hits.
        after: how many matching requests it lets pass first.
        for_s: how long it lasts from when it was armed; None for ever.
    """

    kind: Kind
    method: str = ""
    key: str = ""
    times: int | None = 1
    share: float = 1.0
    after: int = 0
    for_s: float | None = None
    at_byte: int = 0
    bytes_per_s: int = 50_000
    delay_s: float = 0.5
    status: int = 503

    def matches(self, method: str, target: str) -> bool:
        """Whether it is meant for such a request."""
        return self.method in ("", method) and re.search(self.key, target) is not None


@dataclass
class _Armed:
    fault: Fault
    since_s: float
    hits: int = 0
    passed: int = 0

    def over(self, now_s: float) -> bool:
        fault = self.fault
        late = fault.for_s is not None and now_s - self.since_s >= fault.for_s
        return late or (fault.times is not None and self.hits >= fault.times)


@dataclass
class _Head:
    """A request line or status line with its headers, as bytes and as far as they matter here."""

    raw: bytes
    first: list[str]
    length_bytes: int | None = None
    chunked: bool = False
    close: bool = False

    @classmethod
    def parse(cls, raw: bytes) -> _Head:
        lines = raw.decode("latin-1").split("\r\n")
        head = cls(raw, lines[0].split(" ", 2))
        for line in lines[1:]:
            name, _, value = line.partition(":")
            match name.strip().lower():
                case "content-length":
                    head.length_bytes = int(value)
                case "transfer-encoding":
                    head.chunked = "chunked" in value.lower()
                case "connection":
                    head.close = "close" in value.lower()
        return head

    def with_length(self, length_bytes: int) -> bytes:
        return re.sub(rb"(?i)(\r\ncontent-length:)[^\r]*", rb"\1 %d" % length_bytes, self.raw)


class _Broken(Exception):
    """The fault has been done; the client's connection ends here."""


@dataclass
class _Client:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    server: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def reset(self) -> None:
        """Closed with a reset, as by a machine that crashed."""
        connection = self.writer.get_extra_info("socket")
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self.writer.transport.abort()

    def leave_server(self) -> None:
        if self.server is not None:
            self.server[1].transport.abort()
            self.server = None


@dataclass
class FaultProxy:
    """The proxy, as a context manager.

    Attributes:
        counts: how often each fault was done.
        requests: how many requests came in, those that were hit included.
        held: how many requests wait for `release`, or have waited.
    """

    upstream: str
    seed: int = 0
    counts: Counter[Kind] = field(default_factory=Counter)
    requests: int = 0
    held: int = 0

    def __post_init__(self) -> None:
        host, _, port = self.upstream.removeprefix("http://").partition(":")
        self._address = (host, int(port))
        self._random = random.Random(self.seed)
        self._lock = threading.Lock()
        self._armed: list[_Armed] = []
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy", daemon=True)
        self._released = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._clients: dict[asyncio.Task[None], _Client] = {}
        self._port = 0

    @property
    def endpoint(self) -> str:
        """The URL for clients."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STARTED_WITHIN_S)
        self._loop.close()

    def arm(self, *faults: Fault) -> None:
        """Add faults; they count from now."""
        with self._lock:
            self._armed += [_Armed(fault, time.monotonic()) for fault in faults]

    def clear(self) -> None:
        """Let everything pass again."""
        with self._lock:
            self._armed = []

    def release(self) -> None:
        """Let all requests that are held go on."""
        self._do(self._release())

    async def _release(self) -> None:
        self._released.set()
        self._released = asyncio.Event()

    async def _hold(self) -> None:
        self.held += 1
        await self._released.wait()

    @contextlib.contextmanager
    def down(self) -> Iterator[None]:
        """No server at all: connections are reset, and new ones refused."""
        self._do(self._close())
        try:
            yield
        finally:
            self._do(self._listen())

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        done: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return done.result(_STARTED_WITHIN_S)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", self._port, limit=_PIECE_BYTES, reuse_address=True
        )
        self._port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        tasks = list(self._clients)
        for task in tasks:
            self._clients[task].reset()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    def _pick(self, method: str, target: str) -> Fault | None:
        now_s = time.monotonic()
        with self._lock:
            self.requests += 1
            self._armed = [armed for armed in self._armed if not armed.over(now_s)]
            for armed in self._armed:
                if armed.fault.matches(method, target) and self._random.random() < armed.fault.share:
                    if armed.passed < armed.fault.after:
                        armed.passed += 1
                        continue
                    armed.hits += 1
                    self.counts[armed.fault.kind] += 1
                    return armed.fault
        return None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        client = self._clients[task] = _Client(reader, writer)
        try:
            while await self._one_request(client):
                pass
        except (_Broken, OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            client.reset()
        finally:
            client.leave_server()
            writer.close()
            del self._clients[task]

    async def _one_request(self, client: _Client) -> bool:
        request = _Head.parse(await client.reader.readuntil(_ENDS))
        method, target = request.first[0], request.first[1]
        fault = self._pick(method, target)
        kind = fault.kind if fault else None
        if fault is not None and kind is Kind.STATUS:
            await _pass(client.reader, None, request)
            await _answer(client.writer, method, fault.status)
            return True
        if kind is Kind.BLACK_HOLE:
            while await client.reader.read(_PIECE_BYTES):
                pass
            raise _Broken
        if fault is not None and kind is Kind.DELAY:
            await asyncio.sleep(fault.delay_s)
        if client.server is None:
            client.server = await asyncio.open_connection(*self._address, limit=_PIECE_BYTES)
        reader, writer = client.server
        if fault is not None and kind in (Kind.HOLD_REQUEST, Kind.HOLD_BODY):
            body = b"".join([piece async for piece in _body(client.reader, request)])
            if kind is Kind.HOLD_BODY:
                writer.write(request.raw + body[: min(fault.at_byte, len(body) - 1)])
                await self._hold()
                raise _Broken
            await self._hold()
            writer.write(request.raw + body)
            request = _Head(b"", request.first, close=request.close)
        writer.write(request.raw)
        await _pass(
            client.reader, writer, request, fault if kind in (Kind.CUT_REQUEST, Kind.TRICKLE) else None
        )
        response = _Head.parse(await reader.readuntil(_ENDS))
        if method == "HEAD" or response.first[1] in ("204", "304"):
            response.length_bytes, response.chunked = 0, False
        if kind is Kind.LOST_RESPONSE:
            await _pass(reader, None, response)
            raise _Broken
        if kind is Kind.HOLD_RESPONSE:
            answer = b"".join([piece async for piece in _body(reader, response)])
            await self._hold()
            client.writer.write(response.raw + answer)
            return not (request.close or response.close)
        await self._respond(client, reader, response, fault)
        return not (request.close or response.close)

    async def _respond(
        self, client: _Client, reader: asyncio.StreamReader, response: _Head, fault: Fault | None
    ) -> None:
        if fault is not None and fault.kind is Kind.SHORTEN:
            whole = response.length_bytes or 0
            left = max(0, min(fault.at_byte, whole - 1))
            client.writer.write(response.with_length(left))
            client.writer.write((await reader.readexactly(whole))[:left])
            await client.writer.drain()
            return
        client.writer.write(response.raw)
        broken = fault if fault and fault.kind in (Kind.CUT_RESPONSE, Kind.FLIP, Kind.TRICKLE) else None
        await _pass(reader, client.writer, response, broken)


async def _answer(writer: asyncio.StreamWriter, method: str, status: int) -> None:
    body = b"" if method == "HEAD" else _SLOW_DOWN
    head = f"HTTP/1.1 {status} No\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()


async def _pass(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter | None,
    head: _Head,
    fault: Fault | None = None,
) -> None:
    """Read a body to its end and write it on, or nowhere, with what `fault` does to it."""
    passed = 0
    # In a body that is shorter than that, the last byte: a fault that is counted has happened.
    at_byte = min(fault.at_byte, (head.length_bytes or 1) - 1) if fault is not None else 0
    async for read in _body(reader, head):
        if writer is None:
            continue
        piece = read
        if fault is not None and passed <= at_byte < passed + len(read):
            inside = at_byte - passed
            if fault.kind is Kind.FLIP:
                piece = read[:inside] + bytes([read[inside] ^ 1]) + read[inside + 1 :]
            elif fault.kind in (Kind.CUT_REQUEST, Kind.CUT_RESPONSE):
                writer.write(read[:inside])
                await writer.drain()
                raise _Broken
        passed += len(read)
        if fault is not None and fault.kind is Kind.TRICKLE:
            await _trickle(writer, piece, fault.bytes_per_s)
        else:
            writer.write(piece)
            await writer.drain()
    if fault is not None and fault.kind in (Kind.CUT_REQUEST, Kind.CUT_RESPONSE):
        raise _Broken  # without a body, after the head
    if writer is not None:
        await writer.drain()


async def _trickle(writer: asyncio.StreamWriter, piece: bytes, bytes_per_s: int) -> None:
    step = max(1, bytes_per_s // _TRICKLES_PER_S)
    for start in range(0, len(piece), step):
        writer.write(piece[start : start + step])
        await writer.drain()
        await asyncio.sleep(1 / _TRICKLES_PER_S)


async def _body(reader: asyncio.StreamReader, head: _Head) -> AsyncIterator[bytes]:
    """A body in pieces, in the encoding in which it travels."""
    if not head.chunked:
        left = head.length_bytes or 0
        while left:
            piece = await reader.read(min(left, _PIECE_BYTES))
            if not piece:
                raise _Broken
            left -= len(piece)
            yield piece
        return
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        yield line + await reader.readexactly(size + 2)
        if size == 0:
            return
