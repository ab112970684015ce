"""What stands at `/` of a service with a pool: the server as a whole, the pooled models themselves, and the
way to those that have replicas of their own.

A pooled model has the routes that every model has (`serving.model_app`). What runs it loads it first, and
waits no longer than the request may take. What only asks about it is answered from the registry while it is
cold, so neither probes nor clients that read metadata load a model, or keep one from being evicted. A model
that is cold is ready: a request for it will be answered; it is not ready where its last load failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.registry import Registry
from cluster.storage import Store
from serving.batching.model import BatchModel
from serving.front_app import FrontApp, model_name
from serving.http import Request, Response
from serving.model_app import ModelApp
from serving.passing import given
from serving.pool.pool import Hosted, Pool
from serving.protocol.codec import Codec
from serving.protocol.limits import Limits
from serving.protocol.terms import TIMEOUT_HEADER, read_terms
from serving.replica import Loaded, Replica
from serving.runtimes.base import Arrays

MakeApp = Callable[[Replica], ModelApp]
_LEAST_S = 0.001


class PoolApp(FrontApp):
    """A `FrontApp` with models in it.

    Args:
        pool: it keeps the models.
        make_app: makes the routes of a model, from what runs it.
        front: what `FrontApp` takes.
    """

    def __init__(
        self,
        pool: Pool,
        store: Store,
        make_app: MakeApp,
        *,
        describe_every_s: float,
        clock: Clock = SYSTEM_CLOCK,
        **front: Any,
    ) -> None:
        super().__init__(clock=clock, **front)
        self._pool = pool
        self.names = sorted([*self.names, *pool.hosted])
        self._pooled = {
            name: _Pooled(pool, hosted, store, make_app, describe_every_s, clock)
            for name, hosted in pool.hosted.items()
        }

    async def respond(self, request: Request) -> Response:
        pooled = self._pooled.get(model_name(request.path) or "")
        return await (super().respond(request) if pooled is None else pooled.respond(request))

    def answered(self, request: Request, status: int, duration_s: float) -> None:
        pooled = self._pooled.get(model_name(request.path) or "")
        if pooled is not None:
            pooled.about.answered(request, status, duration_s)


class _Pooled:
    """One model's requests, hot or cold."""

    def __init__(
        self,
        pool: Pool,
        hosted: Hosted,
        store: Store,
        make_app: MakeApp,
        describe_every_s: float,
        clock: Clock,
    ) -> None:
        self._pool = pool
        self._hosted = hosted
        self._registry = Registry(store)
        self._make_app = make_app
        self._clock = clock
        self._describe_every_s = describe_every_s
        self._described_s = -describe_every_s
        self._cold = Replica(hosted.served, store, hosted.metrics, clock=clock)
        self.about = make_app(self._cold)
        """Answers what can be said of the model while it is cold."""
        self._running: tuple[Replica, ModelApp] | None = None

    async def respond(self, request: Request) -> Response:
        if request.method == "POST" and request.path.rstrip("/").endswith(("/infer", ":predict")):
            self._pool.enter(self._hosted.name)
            try:
                return await self._run(request)
            finally:
                self._pool.leave(self._hosted.name)
        if (hot := self._hosted.replica) is not None:
            return await self._app_of(hot).respond(request)
        self._pool.check(self._hosted.name)
        await self._describe()
        return await self.about.respond(request)

    async def _run(self, request: Request) -> Response:
        if (hot := self._hosted.replica) is not None:
            return await self._app_of(hot).respond(request)
        began_s, slo_s = self._clock.monotonic_s(), self._hosted.served.slo_ms / 1000
        end_s = read_terms(request.headers, {}).deadline_s(began_s, slo_s)
        # The body first: only then is it seen if the client goes away.
        body = await self.about.read_body(request)
        with self.about.while_connected(request):
            replica = await self._pool.hot(self._hosted.name, end_s - self._clock.monotonic_s())
        left_s = max(end_s - self._clock.monotonic_s(), _LEAST_S)
        headers = {**request.headers, TIMEOUT_HEADER: f"{left_s:.6f}".encode()}
        again = replace(request, headers=headers, receive=given(body, request.receive))
        return await self._app_of(replica).respond(again)

    def _app_of(self, replica: Replica) -> ModelApp:
        if self._running is None or self._running[0] is not replica:
            self._running = (replica, self._make_app(replica))
        return self._running[1]

    async def _describe(self) -> None:
        """Have the registry say what the alias points at now, at most so often."""
        now_s = self._clock.monotonic_s()
        if now_s - self._described_s >= self._describe_every_s:
            self._cold.show(await asyncio.to_thread(self._read))
            self._described_s = now_s

    def _read(self) -> Loaded:
        version = self._registry.resolve(self._hosted.served.ref)
        manifest, signature = self._registry.servable(version)
        served = self._hosted.served
        limits = Limits(max_body_bytes=served.max_body_bytes, max_rows=served.max_queue_rows)
        runtime = _Absent(str(manifest.meta.get("runtime", "")))
        return Loaded(version, Codec(signature, version.model, limits), BatchModel(runtime, signature))


class _Absent:
    """Stands for the runtime of a version that is described, not loaded."""

    def __init__(self, platform: str) -> None:
        self.platform = platform

    def run(self, inputs: Arrays) -> Arrays:
        raise AssertionError("a cold model was run")

    def close(self) -> None:
        """Nothing is held."""
