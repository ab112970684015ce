"""The short way from the web server of a replica to its application.

With direct ingress (HAProxy mode), each ingress replica has a web server of its own, and Ray Serve wraps
what it serves: request metadata, a context, log record, metrics, a semaphore and up to two tasks for every
request, about two thirds of all the time that a small request takes. Measured on 2 cores through HAProxy,
one trivial handler: 7,600/s through Serve's request path, 20,000/s past it.

`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` names `middlewares`, which Serve puts around the whole web
server, outermost. In a replica that has entered an application here, its requests go straight there;
whatever Serve itself must answer (`/-/healthz`, `/-/routes`) goes on to Serve. What Serve no longer sees is
done elsewhere: scaling reads our own count of requests in flight (`serving.scaling`), the queue's own bound
sheds, and the web server's graceful shutdown waits for requests that are being answered.

What can't be avoided, since Serve makes the web server and has no setting for it: of some 70 µs that the
smallest request takes under uvicorn alone (95 µs and more in a replica, where other threads and processes
share the cores), uvicorn's own 21 µs (half of them system calls; a scope, a task and an event for each
request, a timer for keep-alive, two passes over every header sent, a middleware for proxies' headers that
changes nothing here); and HAProxy's 26 µs on another core. A protocol of our own in uvicorn's place could
spare a part of the 21 µs, at most a seventh of the whole, and would have to do its limits, keep-alive and
shutdown again. The rest is ours: about 20 µs to read and check JSON, 20 µs to queue, run and hand back, 10
µs for all else. Ray's daemons take 1 to 3 µs a request, though none reaches them.

In other processes (the ordinary proxy, a replica started without this) nothing is entered, and requests go
Serve's way, with a sane `x-request-id`, since Serve echoes whatever the client sent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from serving.http import HttpApp, Scope, Send, request_id
from serving.waiting import Receive

_entered: list[tuple[HttpApp, int]] = []
"""The application and the thread of its event loop."""
_told: list[Callable[[int], None]] = []
"""Who asked for the port of the web server."""


def enter(app: HttpApp) -> None:
    """Make `app` this process's application (one replica is one process), on the running event loop."""
    _entered[:] = [(app, threading.get_ident())]


def leave() -> None:
    """Undo `enter`."""
    _entered.clear()
    _told.clear()


def when_port_is_known(tell: Callable[[int], None]) -> None:
    """Call `tell` once with the web server's port, which the first health check that comes shows."""
    _told.append(tell)


def middlewares() -> list[Any]:
    """What Serve is to put around its web servers."""
    from starlette.middleware import Middleware

    return [Middleware(ShortWay)]


class ShortWay:
    """ASGI middleware: past Serve where an application was entered, else on to `around`."""

    def __init__(self, app: Any) -> None:
        self._around = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._around(scope, receive, send)
        elif (app := _application(scope["path"])) is not None:
            await app.serve_directly(scope, receive, send)
        else:
            while _told and scope.get("server"):
                _told.pop()(scope["server"][1])
            scope["headers"] = _with_sane_id(scope["headers"])
            await self._around(scope, receive, send)


def _application(path: str) -> HttpApp | None:
    if not _entered or path.startswith("/-/"):
        return None
    app, thread = _entered[0]
    # Serve may run the web server and user code on two loops, each in its thread; ours must stay on its own.
    # (To ask for the running loop is a system call.)
    return app if thread == threading.get_ident() else None


def _with_sane_id(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    sane = request_id(dict(headers)).encode()
    return [header for header in headers if header[0] != b"x-request-id"] + [(b"x-request-id", sane)]
