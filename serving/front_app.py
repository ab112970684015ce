"""What stands at `/` of a service with several models: the server as a whole, and who is asked for what.

Requests for `/v2/models/NAME/…` go straight from the ingress to that model's replicas; what comes here is
`/v1/models/NAME:predict`, spellings of a path that the ingress doesn't recognise, and models that don't
exist. Knows models only as something that answers.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence

import orjson

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import NotFound, NotReady, WrongMethod, shown
from cluster.signature import Signature
from serving.guard import Guard
from serving.http import HttpApp, Request, Response
from serving.protocol.limits import Limits
from serving.protocol.metadata import server_metadata
from serving.protocol.openapi import openapi

Forward = Callable[[Request, bytes], Awaitable[Response]]
_JSON = [(b"content-type", b"application/json")]


class FrontApp(HttpApp):
    """Answers for the server, and passes the rest on.

    Args:
        models: by name, how a model is asked.
        not_ready: gives the names of models that can't answer now.
        signatures: gives names and signatures of the models, for the OpenAPI document.
        scrape: gives the whole service's metrics.
    """

    def __init__(
        self,
        models: Mapping[str, Forward],
        *,
        not_ready: Callable[[], Awaitable[Sequence[str]]],
        signatures: Callable[[], Awaitable[Sequence[tuple[str, Signature]]]],
        scrape: Callable[[], Awaitable[bytes]],
        max_body_bytes: int,
        guard: Guard | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        super().__init__(max_body_bytes=max_body_bytes, guard=guard, clock=clock)
        self._models = models
        self.names = sorted(models)
        """Of all models, for whoever asks for another one."""
        self._not_ready = not_ready
        self._signatures = signatures
        self._scrape = scrape
        self._routes: dict[str, Callable[[], Awaitable[Response]]] = {
            "/v2": self._server_metadata,
            "/v2/health/live": self._live,
            "/v2/health/ready": self._ready,
            "/metrics": self._metrics,
            "/openapi.json": self._openapi,
        }

    async def respond(self, request: Request) -> Response:
        if route := self._routes.get(request.path.rstrip("/")):
            if request.method not in ("GET", "HEAD"):
                raise WrongMethod("not a method of this route", got=shown(request.method), allowed="GET")
            return await route()
        name = model_name(request.path)
        if name is None:
            raise NotFound("no such route", got=shown(request.path), fix="see /openapi.json")
        if name not in self._models:
            raise NotFound("no such model is served", got=shown(name), allowed=", ".join(self.names))
        body = await self.read_body(request)
        with self.while_connected(request):
            return await self._models[name](request, body)

    async def _server_metadata(self) -> Response:
        return Response(200, server_metadata(), _JSON)

    async def _live(self) -> Response:
        return Response(200, b'{"live":true}', _JSON)

    async def _ready(self) -> Response:
        if waiting := await self._not_ready():
            raise NotReady(
                "not every model can answer yet", retry_after_s=1, got=", ".join(waiting), fix="try again"
            )
        return Response(200, b'{"ready":true}', _JSON)

    async def _metrics(self) -> Response:
        return Response(200, await self._scrape(), [(b"content-type", b"text/plain; version=0.0.4")])

    async def _openapi(self) -> Response:
        limits = Limits(max_body_bytes=self.max_body_bytes)
        return Response(200, orjson.dumps(openapi(await self._signatures(), limits)), _JSON)


def model_name(path: str) -> str | None:
    """Whom a path asks: `NAME` of `/v1/models/NAME:predict` or `/v2/models/NAME[/…]`."""
    if path.startswith("/v2/models/"):
        return path.removeprefix("/v2/models/").partition("/")[0]
    if path.startswith("/v1/models/"):
        return path.removeprefix("/v1/models/").partition(":")[0]
    return None
