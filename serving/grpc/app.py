"""The Serve application of the gateway; `serving.grpc.app:build` is its import path.

Why not Ray Serve's own gRPC (2.60): its proxies choose an application by `application` metadata, which
the clients of this protocol don't send, so only a service with one application could be reached; they
don't tell a replica how much time a call has left; and they take messages of any size before anybody is
asked for a key. So the gateway is a deployment with a server of its own, which asks the HTTP ingress beside
it, whichever that is.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ray import serve
from ray.serve.schema import LoggingConfig

from cluster.config import Frozen
from cluster.errors import NotFound
from serving.grpc.gateway import Gateway
from serving.grpc.ingress import Ingress
from serving.grpc.server import start_server
from serving.http import HttpApp, Request, Response
from serving.key_watch import watch_keys
from serving.service import Service

_UNBOUNDED_REQUESTS = 100_000


class BuildArgs(Frozen):
    """The `args` of the application."""

    service: Service
    address: str
    """`HOST:PORT` to listen at."""
    ingress: str
    """The URL of the HTTP ingress, as it is reached from the gateway's node."""
    node_id: str | None = None
    """The Ray node that the gateway must run on."""


@serve.ingress()
class GatewayServer:
    """The gateway, as Ray Serve runs it."""

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        found = BuildArgs.model_validate(args)
        loop = asyncio.get_running_loop()
        self._drain_s = found.service.drain_s
        self._watch = await asyncio.to_thread(watch_keys, found.service, loop, None)
        self._ingress = await Ingress(found.ingress).__aenter__()
        gateway = Gateway(found.service, self._ingress, self._watch.guard if self._watch else None)
        self._server = await start_server(gateway, found.address)

    def __serve_build_asgi_app__(self) -> HttpApp:
        return _End(self)

    async def stop(self) -> None:
        """Refuse new calls, answer those that are here, then close."""
        await self._server.stop(self._drain_s)
        await self._ingress.__aexit__(None, None, None)
        if self._watch is not None:
            self._watch.stop()


class _End(HttpApp):
    """The gateway has no HTTP of its own; this is how it learns that it is to stop."""

    def __init__(self, gateway: GatewayServer) -> None:
        super().__init__(max_body_bytes=0)
        self._gateway = gateway

    async def respond(self, request: Request) -> Response:
        raise NotFound("there is nothing here over HTTP")

    async def closed(self) -> None:
        await self._gateway.stop()


def build(args: dict[str, Any]) -> serve.Application:
    """The application that `BuildArgs` describe."""
    found = BuildArgs.model_validate(args)
    actor: dict[str, Any] = {"num_cpus": 0}
    if found.node_id is not None:
        actor["label_selector"] = {"ray.io/node-id": found.node_id}
    deployment = serve.deployment(GatewayServer).options(
        name="grpc",
        max_ongoing_requests=_UNBOUNDED_REQUESTS,
        graceful_shutdown_timeout_s=found.service.drain_s,
        ray_actor_options=actor,
        logging_config=LoggingConfig(enable_access_log=False),
    )
    return deployment.bind(found.model_dump(mode="json"))
