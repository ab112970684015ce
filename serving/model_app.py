"""The routes of one model, as an HTTP application on a replica.

Parsing that is long (images, large bodies) and rendering of large answers go to a thread, so that the
event loop stays free for others. Says which version answered, in every answer that a model gave.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import NotFound, WrongMethod, shown
from serving.guard import Guard
from serving.http import HttpApp, Request, Response
from serving.metrics import ReplicaMetrics
from serving.protocol.limits import Limits
from serving.protocol.metadata import server_metadata
from serving.protocol.oip_request import announced_json_bytes
from serving.protocol.openapi import openapi
from serving.protocol.reading import refuse_encodings
from serving.protocol.terms import read_terms
from serving.replica import Loaded, Replica
from serving.request_log import RequestLog
from serving.rollout.answering import answer_by_one, shadow, take_feedback
from serving.rollout.feedback import parse_feedback
from serving.tracing import Spans

LONG_BODY_BYTES = 128 * 1024
LONG_BINARY_BYTES = 4 * 1024 * 1024
"""Tensors in binary are only looked through for what isn't finite: a millisecond for as much."""
_JSON = [(b"content-type", b"application/json")]

Route = Callable[[Request], Awaitable[Response]]


class ModelApp(HttpApp):
    """Answers for one model: Open Inference Protocol v2, `:predict`, and what the server says of itself.

    Args:
        replica: it runs the model.
        metrics: told of every answer.
        scrape: gives the whole service's metrics, as Prometheus reads them.
        guard: asks callers for a key; None lets everyone in.
        log: told of every answer; it writes a sample of them.
        spans: told of every answer; it makes spans of those that are traced.
    """

    def __init__(
        self,
        replica: Replica,
        metrics: ReplicaMetrics,
        scrape: Callable[[], Awaitable[bytes]],
        guard: Guard | None = None,
        clock: Clock = SYSTEM_CLOCK,
        *,
        log: RequestLog | None = None,
        spans: Spans | None = None,
    ) -> None:
        super().__init__(max_body_bytes=replica.served.max_body_bytes, guard=guard, clock=clock)
        self._replica = replica
        self._metrics = metrics
        self._scrape = scrape
        self._log = log
        self._spans = spans
        self._slo_s = replica.served.slo_ms / 1000
        name = self._name = replica.served.ref.model
        self._base = f"/v2/models/{name}"
        self._predict_path = f"/v1/models/{name}:predict"
        self._routes: dict[str, tuple[str, Route]] = {
            f"{self._base}/infer": ("POST", self._infer),
            self._predict_path: ("POST", self._predict),
            f"/v1/models/{name}:feedback": ("POST", self._feedback),
            self._base: ("GET", self._metadata),
            f"{self._base}/ready": ("GET", self._ready),
            "/v2": ("GET", self._server_metadata),
            "/v2/health/live": ("GET", self._live),
            "/v2/health/ready": ("GET", self._ready),
            "/metrics": ("GET", self._all_metrics),
            "/openapi.json": ("GET", self._openapi),
        }
        self._names = {
            f"{self._base}/infer": "infer",
            self._predict_path: "predict",
            f"/v1/models/{name}:feedback": "feedback",
        }

    async def respond(self, request: Request) -> Response:
        found = self._routes.get(request.path) or self._versioned(request.path)
        if found is None:
            raise self._no_route(request.path)
        method, route = found
        if request.method != method and not (method == "GET" and request.method == "HEAD"):
            return Response(405, *self._wrong_method(request, method))
        return await route(request)

    def answered(self, request: Request, status: int, duration_s: float) -> None:
        route = self._names.get(request.path, "other")
        self._metrics.answered(route, status, duration_s, request.account)
        trace = self._spans.answered(request, route, status, duration_s) if self._spans is not None else ""
        if self._log is not None:
            self._log.answered(request, route, status, duration_s, trace)

    def _versioned(self, path: str) -> tuple[str, Route] | None:
        """The route of `…/versions/{v}[/ready|/infer]`, or of the same path with a slash at its end.

        Raises:
            NotFound: the model is here, but not in that version.
        """
        if path.endswith("/"):
            return self._routes.get(path.rstrip("/"))
        start = f"{self._base}/versions/"
        if not path.startswith(start):
            return None
        version, slash, rest = path.removeprefix(start).partition("/")
        found = self._routes.get(f"{self._base}/{rest}" if slash else self._base)
        if found is not None and version != self._replica.serving.name:
            raise NotFound(
                f"version {shown(version)} of model '{self._name}' is not in service",
                allowed=self._replica.serving.name,
                fix="leave the version out to get the one in service",
            )
        return found

    def _no_route(self, path: str) -> NotFound:
        if path.startswith(("/v2/models/", "/v1/models/")):
            return NotFound(
                "no such model or route",
                got=shown(path),
                allowed=", ".join(self._names) + f", {self._base}[/versions/N][/ready]",
                fix=f"the model served here is '{self._name}'",
            )
        return NotFound("no such route", got=shown(path), fix="see /openapi.json")

    def _wrong_method(self, request: Request, method: str) -> tuple[bytes, list[tuple[bytes, bytes]]]:
        error = WrongMethod("not a method of this route", got=shown(request.method), allowed=method)
        from serving.protocol.failures import render_error

        _, body, headers = render_error(error, request.id)
        return body, [*headers, (b"allow", method.encode())]

    async def _infer(self, request: Request) -> Response:
        now_s = self._clock.monotonic_s()
        json_bytes = announced_json_bytes(request.headers)
        if json_bytes is None:
            body: bytes | memoryview = await self.read_body(request)
        else:
            body = await self.read_aligned(request, json_bytes)

        async def answer(loaded: Loaded) -> Response:
            parsed = await self._parse(
                loaded, request, loaded.codec.parse_oip, body, request.headers, json_bytes
            )
            outputs = await self._run(loaded, request, parsed, now_s)
            ran_s = self._clock.monotonic_s()
            rendered, headers = loaded.codec.render_oip(outputs, request=parsed, version=loaded.name)
            request.account.encode_s = self._clock.monotonic_s() - ran_s
            return Response(200, rendered, [*headers, (b"x-model-version", loaded.name.encode())])

        return await answer_by_one(self._replica, request, answer)

    async def _predict(self, request: Request) -> Response:
        now_s = self._clock.monotonic_s()
        body = await self.read_body(request)
        refuse_encodings(request.headers)
        content_type = request.headers.get(b"content-type", b"").decode("latin-1")

        async def answer(loaded: Loaded) -> Response:
            parsed = await self._parse(loaded, request, loaded.codec.parse_predict, body, content_type)
            outputs = await self._run(loaded, request, parsed, now_s)
            ran_s = self._clock.monotonic_s()
            rendered = loaded.codec.render_predict(outputs, version=loaded.name)
            request.account.encode_s = self._clock.monotonic_s() - ran_s
            return Response(200, rendered, [*_JSON, (b"x-model-version", loaded.name.encode())])

        return await answer_by_one(self._replica, request, answer)

    async def _feedback(self, request: Request) -> Response:
        refuse_encodings(request.headers)
        counted = take_feedback(self._replica, parse_feedback(await self.read_body(request)))
        return Response(202, orjson.dumps({"counted": counted}), _JSON)

    async def _parse(
        self,
        loaded: Loaded,
        request: Request,
        parse: Callable[..., Any],
        body: bytes | memoryview,
        hints: Any,
        json_bytes: int | None = None,
    ) -> Any:
        account, began_s = request.account, self._clock.monotonic_s()
        account.version, account.received_bytes = loaded.name, len(body)
        is_long = len(body) > LONG_BODY_BYTES if json_bytes is None else len(body) > LONG_BINARY_BYTES
        if loaded.codec.decodes_images or is_long or (json_bytes or 0) > LONG_BODY_BYTES:
            parsed = await asyncio.to_thread(parse, body, hints)
        else:
            parsed = parse(body, hints)
        account.rows, account.decode_s = parsed.rows, self._clock.monotonic_s() - began_s
        return parsed

    async def _run(self, loaded: Loaded, request: Request, parsed: Any, now_s: float) -> Any:
        terms = read_terms(request.headers, parsed.parameters)
        deadline_s = terms.deadline_s(now_s, self._slo_s)
        tried = self._replica.tried
        with self.while_connected(request):
            outputs = await self._replica.infer(
                loaded, parsed, deadline_s, terms.priority, account=request.account
            )
        if tried is not None:
            tried.side(loaded).answered()
            shadow(self._replica, tried, loaded, parsed.inputs, outputs)
        return outputs

    async def _metadata(self, request: Request) -> Response:
        loaded = self._replica.serving
        headers = [*_JSON, (b"x-model-version", loaded.name.encode())]
        return Response(200, loaded.codec.metadata([loaded.name], loaded.runtime.platform), headers)

    async def _ready(self, request: Request) -> Response:
        name = self._replica.serving.name
        return Response(200, b'{"ready":true}', [*_JSON, (b"x-model-version", name.encode())])

    async def _live(self, request: Request) -> Response:
        return Response(200, b'{"live":true}', _JSON)

    async def _server_metadata(self, request: Request) -> Response:
        return Response(200, server_metadata(), _JSON)

    async def _openapi(self, request: Request) -> Response:
        codec = self._replica.serving.codec
        return Response(200, openapi_json([(self._name, codec.signature)], codec.limits), _JSON)

    async def _all_metrics(self, request: Request) -> Response:
        return Response(200, await self._scrape(), [(b"content-type", b"text/plain; version=0.0.4")])


def openapi_json(models: list[tuple[str, Any]], limits: Limits) -> bytes:
    """The OpenAPI document of these models, as JSON."""
    return orjson.dumps(openapi(models, limits))
