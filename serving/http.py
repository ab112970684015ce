"""HTTP on ASGI, without a framework: read a request within bounds, answer it, map errors.

Two ways lead here. `serve_directly` is called by the web server itself (`serving.lane`); `__call__` is
called through Ray Serve's own request path, which adds an `x-request-id` header to what we answer. The
first does a third of the work per request.

Bounds on a body: its announced size is checked before a byte of it is read, its real size while it is
read; it must keep up a minimal rate; and what all requests together hold in memory while they are still
incomplete has an end. Subclasses implement `respond`; nothing here knows what a model is.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import BadRequest, Overloaded, TandemError, TooLarge, TooSlow, shown
from serving.account import Account
from serving.guard import Guard
from serving.protocol.failures import render_error
from serving.protocol.requests import Headers
from serving.waiting import ClientGone, InTime, Message, Overdue, Receive, WhileConnected

logger = logging.getLogger("tandem.serving")

Scope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

BODY_GRACE_S = 10.0
"""How long a body may take to begin with; each 64 KiB received gives another second."""
BODY_MIN_BYTES_PER_S = 64 * 1024
WATCH_AFTER_S = 0.1
"""A client that has waited this long is watched, so that its request is dropped if it goes away."""
_PROBE = re.compile(r"/v2/(health/(live|ready)|models/[^/]+(/versions/[^/]+)?/ready)")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_SIZE = re.compile(rb"[0-9]{1,18}")
_ALIGNMENT = 8


@dataclass(slots=True)
class Request:
    """One request, its body not yet read. `path` is percent-decoded; header names are lower-case."""

    method: str
    path: str
    headers: dict[bytes, bytes]
    id: str
    receive: Receive
    body_read: bool = False
    account: Account = field(default_factory=Account)


@dataclass(slots=True)
class Response:
    """An answer; `content-length` and `x-request-id` are added on the way out."""

    status: int
    body: bytes
    headers: Headers = field(default_factory=list)


class _Ids:
    """Ids of requests: random to tell processes apart, then counted, as randomness is a system call."""

    def __init__(self) -> None:
        self._prefix = ""
        self._next = itertools.count(1)

    def new(self) -> str:
        if not self._prefix:
            self._prefix = secrets.token_hex(6)
        return f"{self._prefix}-{next(self._next)}"


_ids = _Ids()


def request_id(headers: dict[bytes, bytes]) -> str:
    """The client's own id for the request, if it is fit for a header and a log, else a new one."""
    given = headers.get(b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode()
    return _ids.new()


class HttpApp:
    """An ASGI application.

    Args:
        max_body_bytes: of one request.
        max_buffered_bytes: of all bodies that are being received.
        guard: asks whoever comes over the network for a key; None lets everyone in.
    """

    def __init__(
        self,
        *,
        max_body_bytes: int,
        max_buffered_bytes: int | None = None,
        guard: Guard | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.max_body_bytes = max_body_bytes
        self.in_flight = 0
        """Requests that have come and aren't answered yet."""
        self._clock = clock
        self._guard = guard
        self._buffer_room_bytes = max_buffered_bytes or 4 * max_body_bytes
        self._begun = Overdue(BODY_GRACE_S)
        """Whose body is awaited."""
        self._asked = Overdue(WATCH_AFTER_S)
        """Whose answer is awaited."""

    async def respond(self, request: Request) -> Response:
        """Answer a request. What it raises becomes the answer, through `render_error`."""
        raise NotImplementedError

    def answered(self, request: Request, status: int, duration_s: float) -> None:
        """Told of every answer sent."""

    async def closed(self) -> None:
        """Told when the server has stopped: nothing comes after this."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._handle(scope, receive, send, own_id=False)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def serve_directly(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As `__call__` for HTTP, with nothing around us that adds headers."""
        await self._handle(scope, receive, send, own_id=True)

    async def respond_to(self, request: Request) -> Response:
        """Answer a request that another application let in and passes on; never raises."""
        started_s = self._clock.monotonic_s()
        self.in_flight += 1
        try:
            response = await self._respond_or_explain(request, None)
        finally:
            self.in_flight -= 1
        request.account.sent_bytes = len(response.body)
        self.answered(request, response.status, self._clock.monotonic_s() - started_s)
        return response

    async def read_body(self, request: Request) -> bytes:
        """The whole body; raises as `read_aligned`."""
        chunks = await self._read_chunks(request)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def read_aligned(self, request: Request, at: int) -> memoryview:
        """The whole body, in memory such that its byte `at` lies where a number of 8 bytes may.

        It is put together from what was received in one copy; an array that begins there needs no other.

        Raises:
            TooLarge: it is over the limit, or says that it will be.
            TooSlow: it doesn't keep up the minimal rate.
            Overloaded: too many large bodies are arriving at once.
            ClientGone: the connection closed.
        """
        chunks = await self._read_chunks(request)
        padding = -at % _ALIGNMENT
        return memoryview(b"".join([bytes(padding), *chunks]))[padding:]

    async def _read_chunks(self, request: Request) -> list[bytes]:
        announced = request.headers.get(b"content-length", b"0")
        if not _SIZE.fullmatch(announced):
            raise BadRequest("the content-length can't be read", got=shown(announced.decode("latin-1")))
        self._check_size(int(announced))
        started_s = asyncio.get_running_loop().time()
        try:
            with InTime(self._begun):
                message = await request.receive()
            body: bytes = message.get("body", b"")
            if message["type"] == "http.request" and not message.get("more_body"):
                self._check_size(len(body))
                request.body_read = True
                return [body]
            return await self._read_rest(request, message, started_s)
        except TimeoutError:
            raise TooSlow(
                "the body did not arrive in time",
                allowed=f"{BODY_GRACE_S:.0f} s and a second more for each {BODY_MIN_BYTES_PER_S} bytes",
                fix="send it faster, or in smaller requests",
            ) from None

    def while_connected(self, request: Request) -> WhileConnected:
        """`with …: await …` raises ClientGone there if the client goes away; its body must have been read."""
        return WhileConnected(self._asked, request.receive)

    async def _read_rest(self, request: Request, message: Message, started_s: float) -> list[bytes]:
        chunks: list[bytes] = []
        held_bytes = 0
        try:
            async with asyncio.timeout_at(started_s + BODY_GRACE_S) as limit:
                while True:
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    chunk: bytes = message.get("body", b"")
                    chunks.append(chunk)
                    held_bytes += len(chunk)
                    self._buffer_room_bytes -= len(chunk)
                    self._check_size(held_bytes)
                    if self._buffer_room_bytes < 0:
                        raise Overloaded("too many large requests are arriving at once", retry_after_s=1)
                    if not message.get("more_body"):
                        request.body_read = True
                        return chunks
                    limit.reschedule(started_s + BODY_GRACE_S + held_bytes / BODY_MIN_BYTES_PER_S)
                    message = await request.receive()
        finally:
            self._buffer_room_bytes += held_bytes

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self.max_body_bytes:
            raise TooLarge(
                "the body is too large",
                got=f"{size_bytes} bytes",
                allowed=f"at most {self.max_body_bytes} bytes",
                fix="send fewer rows in a request",
            )

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            kind = (await receive())["type"]
            if kind == "lifespan.shutdown":
                await self.closed()
            await send({"type": f"{kind}.complete"})
            if kind == "lifespan.shutdown":
                return

    async def _handle(self, scope: Scope, receive: Receive, send: Send, *, own_id: bool) -> None:
        started_s = self._clock.monotonic_s()
        headers = dict(scope["headers"])
        request = Request(scope["method"], scope["path"], headers, request_id(headers), receive)
        self.in_flight += 1
        try:
            response = await self._respond_or_explain(request, self._guard)
        except ClientGone:
            response = Response(499, b"")  # nobody reads it; the web server wants an answer all the same
        finally:
            self.in_flight -= 1
        out = [*response.headers, (b"content-length", str(len(response.body)).encode())]
        if own_id:
            out.append((b"x-request-id", request.id.encode()))
        if not request.body_read and _has_body(headers):
            # Whatever of the body is still to come, we don't wait for it.
            out.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": response.status, "headers": out})
        await send({"type": "http.response.body", "body": response.body})
        request.account.sent_bytes = len(response.body)
        self.answered(request, response.status, self._clock.monotonic_s() - started_s)

    async def _respond_or_explain(self, request: Request, guard: Guard | None) -> Response:
        try:
            if guard is None or _is_probe(request):
                return await self.respond(request)
            with guard.admit(request.headers) as request.account.tenant:
                return await self.respond(request)
        except ClientGone:
            raise
        except Exception as error:
            status, body, headers = render_error(error, request.id)
            if not isinstance(error, TandemError):
                logger.error("request %s failed", request.id, exc_info=error)
            elif status >= 500 and not error.retryable:
                logger.error("request %s failed: %s", request.id, error)
            return Response(status, body, headers)


def _is_probe(request: Request) -> bool:
    """Whether this asks for nothing but health or readiness; whoever probes has no key."""
    return request.method in ("GET", "HEAD") and _PROBE.fullmatch(request.path) is not None


def _has_body(headers: dict[bytes, bytes]) -> bool:
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
