"""A request passed on from the front of a service to a model's replicas, and taken up there.

And what the front knows of the models: which of them run, and what they take.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ray import serve

from cluster.registry import Registry
from cluster.signature import Signature
from cluster.storage import open_store
from serving import trace_context
from serving.front_app import Forward
from serving.http import Request, Response
from serving.layout import DEPLOYMENT, app_name
from serving.service import ServedModel, Service
from serving.waiting import Message, Receive


def forward_to(service: Service, served: ServedModel) -> Forward:
    """How a model with replicas of its own is asked."""
    handle = serve.get_deployment_handle(DEPLOYMENT, app_name=app_name(service, served))

    async def forward(request: Request, body: bytes) -> Response:
        headers = list(trace_context.onward(request.headers).items())
        answer = await handle.ask.remote(request.method, request.path, headers, body, request.id)
        return Response(*answer)

    return forward


def given(body: bytes, then: Receive | None = None) -> Receive:
    """A `receive` that gives `body`, and after it what `then` gives; without it, nothing for ever."""
    is_given = False

    async def receive() -> Message:
        nonlocal is_given
        if is_given:
            if then is not None:
                return await then()
            await asyncio.Event().wait()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


async def not_running(service: Service) -> list[str]:
    """The models with replicas of their own that can't answer now."""
    applications = (await asyncio.to_thread(serve.status)).applications
    running = {name for name, status in applications.items() if status.status == "RUNNING"}
    return [s.ref.model for s in service.own if app_name(service, s) not in running]


async def signatures(service: Service) -> Sequence[tuple[str, Signature]]:
    """Names and signatures of all models, as the registry has them now."""
    return await asyncio.to_thread(_read_signatures, service)


def _read_signatures(service: Service) -> list[tuple[str, Signature]]:
    registry = Registry(open_store(service.store))
    return [
        (served.ref.model, registry.servable(registry.resolve(served.ref))[1]) for served in service.models
    ]
