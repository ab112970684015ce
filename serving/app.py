"""The Serve applications; `serving.app:build` is the import path that KubeRay names.

With `serving.run`, `serving.pool.server` and `serving.passing`, all that speaks Ray Serve. Facts of Ray 2.60
that it rests on:

- `serve.ingress()` without an argument takes any ASGI callable from `__serve_build_asgi_app__`, called on
  the replica after its constructor, on the loop that serves requests.
- An application's route prefix is matched by whole path segments, longest first, by HAProxy and by the
  ordinary proxy; the path that the application sees is the whole one.
- `max_ongoing_requests` bounds only what goes Serve's way, and Serve answers what is above it in its own
  words. It is set out of reach, so that our own queue is what sheds, with a Retry-After it has measured.
- Behind HAProxy a stopping replica stays reachable for RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S,
  then refuses connections, which HAProxy retries elsewhere, and finishes what it has.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import LoggingConfig

from cluster.config import Frozen
from cluster.errors import NotFound
from cluster.storage import open_store
from serving import collector, lane, weights
from serving.exposition import Scraper
from serving.front_app import FrontApp
from serving.http import HttpApp, Request
from serving.kept import KeptModel
from serving.key_watch import KeyWatch, watch_keys
from serving.layout import DEPLOYMENT, app_name, other_app_name
from serving.metrics import ReplicaMetrics
from serving.model_app import ModelApp
from serving.on_node import log_file, node_cache
from serving.passing import forward_to, given, not_running, signatures
from serving.pool.server import PoolServer
from serving.replica import Replica
from serving.request_log import RequestLog
from serving.scaling import kinds_on_serve, on_serve
from serving.scaling.report import written
from serving.service import PoolSettings, Replicas, ServedModel, Service
from serving.tracing import Spans, open_spans

POOL = "pool"
_UNBOUNDED_REQUESTS = 100_000
_REPORT_EVERY_S = 0.5
_LOOK_BACK_S = 2.5
"""Serve samples five times in it; only the newest sample is read."""
_QUIET = LoggingConfig(enable_access_log=False)


class BuildArgs(Frozen):
    """The `args` of an application. Without `model`: the pool, the only model, or the front of several."""

    service: Service
    model: str | None = None
    other: bool = False
    """Whether replicas of the model's second kind are asked for."""


@serve.ingress()
class ModelServer:
    """A replica of one model, as Ray Serve runs it."""

    async def __init__(  # type: ignore[misc] # Serve awaits it
        self, service: dict[str, Any], model: str, other: bool = False
    ) -> None:
        whole = Service.model_validate(service)
        served = _kind(_served(whole, model), other)
        store = open_store(whole.store)
        loop = asyncio.get_running_loop()
        self._metrics = ReplicaMetrics(model)
        self._watch = await asyncio.to_thread(watch_keys, whole, loop, _counting(whole, served))
        self._replica = Replica(served, store, self._metrics, node_cache(whole))
        self._kept = KeptModel(self._replica, store)
        loaded = await asyncio.to_thread(self._kept.first)
        self._metrics.start()
        self._log = RequestLog(log_file(model), whole.log, model)
        self._log.start()
        self._spans = open_spans(whole.tracing, model)
        self._kept.start(loaded, whole.follow_every_s)

    def __serve_build_asgi_app__(self) -> HttpApp:
        self._app = _ModelApp(self._kept, self._metrics, self._watch, log=self._log, spans=self._spans)
        lane.enter(self._app)
        if self._replica.served.other_replicas is not None:
            self._tell_weight()
        collector.settle()
        return self._app

    def _tell_weight(self) -> None:
        """Where there are two kinds of replica, the ingress asks each how much it can do."""
        slo_s = self._replica.served.slo_ms / 1000
        host = os.environ.get(weights.HOST, "127.0.0.1")
        self._teller = weights.WeightTeller(lambda: self._replica.load_now, slo_s, host)

        def start(http_port: int) -> None:
            self._telling = asyncio.ensure_future(self._teller.start(http_port))

        lane.when_port_is_known(start)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `serving.scaling.on_serve` reads."""
        load = self._replica.load_now
        return written(load) if load is not None else {}

    async def ask(
        self, method: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes, request_id: str
    ) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
        """Answer a request that the front passes on."""
        request = Request(method, path, dict(headers), request_id, given(body))
        response = await self._app.respond_to(request)
        return response.status, response.body, response.headers


class _ModelApp(ModelApp):
    """A model's routes, which take the rest of the replica down with them."""

    def __init__(
        self,
        kept: KeptModel,
        metrics: ReplicaMetrics,
        watch: KeyWatch | None,
        *,
        log: RequestLog,
        spans: Spans | None,
    ) -> None:
        guard = watch.guard if watch else None
        super().__init__(kept.replica, metrics, Scraper(), guard=guard, log=log, spans=spans)
        self._request_log, self._open_spans = log, spans
        self._kept = kept
        self._watch = watch

    async def closed(self) -> None:
        lane.leave()
        if self._watch is not None:
            self._watch.stop()
        await self._kept.stop()
        await self._metrics.stop()
        await asyncio.to_thread(self._request_log.stop)
        if self._open_spans is not None:
            await asyncio.to_thread(self._open_spans.stop)


@serve.ingress()
class FrontServer:
    """The front of a service with several models."""

    async def __init__(self, service: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        self._service = Service.model_validate(service)
        loop = asyncio.get_running_loop()
        self._watch = await asyncio.to_thread(watch_keys, self._service, loop, None)

    def __serve_build_asgi_app__(self) -> HttpApp:
        service = self._service
        app = FrontApp(
            {served.ref.model: forward_to(service, served) for served in service.models},
            not_ready=partial(not_running, service),
            signatures=partial(signatures, service),
            scrape=Scraper(),
            max_body_bytes=max(served.max_body_bytes for served in service.models),
            guard=self._watch.guard if self._watch else None,
        )
        lane.enter(app)
        collector.settle()
        return app


def build(args: dict[str, Any]) -> serve.Application:
    """The application that `args` asks for: `{"service": {...}}`, or with `"model": NAME` one of several.

    Raises:
        BadInput: the service isn't one, or has no such model.
    """
    asked = BuildArgs.model_validate(args)
    written = asked.service.model_dump(mode="json")
    if asked.model is None and asked.service.pool is not None:
        options = _pool_options(asked.service, asked.service.pool)
        return serve.deployment(PoolServer).options(**options).bind(written)
    if asked.model is None and len(asked.service.models) > 1:
        front = serve.deployment(FrontServer).options(
            name="front",
            max_ongoing_requests=_UNBOUNDED_REQUESTS,
            graceful_shutdown_timeout_s=asked.service.drain_s,
            ray_actor_options={"num_cpus": 0},
            logging_config=_QUIET,
        )
        return front.bind(written)
    served = _served(asked.service, asked.model)
    deployment = serve.deployment(ModelServer).options(**_options(asked.service, served, asked.other))
    return deployment.bind(written, served.ref.model, asked.other)


def _counting(service: Service, served: ServedModel) -> Callable[[], int]:
    """Counts the replicas of a model, of both kinds, that run now."""
    names = (app_name(service, served), other_app_name(service, served))[: len(served.kinds)]

    def count() -> int:
        applications = serve.status().applications
        deployments = [applications[name].deployments for name in names if name in applications]
        states = [d[DEPLOYMENT].replica_states for d in deployments if DEPLOYMENT in d]
        return max(1, sum(int(state.get("RUNNING", 0)) for state in states))

    return count


def _served(service: Service, model: str | None) -> ServedModel:
    for served in service.models:
        if model in (None, served.ref.model):
            return served
    raise NotFound(
        f"the service has no model '{model}'", allowed=", ".join(s.ref.model for s in service.models)
    )


def _kind(served: ServedModel, other: bool) -> ServedModel:
    """The model as one of its kinds of replica has it."""
    kind = served.other_replicas if other else served.replicas
    return served.model_copy(update={"replicas": kind})


def _options(service: Service, served: ServedModel, other: bool) -> dict[str, Any]:
    replicas = _kind(served, other).replicas
    fixed = replicas.min == replicas.max and len(served.kinds) == 1
    return _replica_options(service, replicas) | (
        {"num_replicas": replicas.min}
        if fixed
        else {"autoscaling_config": _scaled(replicas, _policy(service, served, other))}
    )


def _pool_options(service: Service, pool: PoolSettings) -> dict[str, Any]:
    """The pool scales as a model does, for the shortest of its models' SLOs."""
    replicas, slo_s = pool.replicas, min(served.slo_ms for served in service.pooled) / 1000
    options = _replica_options(service, replicas) | {"name": POOL}
    if replicas.min == replicas.max:
        return options | {"num_replicas": replicas.min}
    return options | {"autoscaling_config": _scaled(replicas, _one_kind(replicas, slo_s))}


def _replica_options(service: Service, replicas: Replicas) -> dict[str, Any]:
    return {
        "name": DEPLOYMENT,
        "max_ongoing_requests": _UNBOUNDED_REQUESTS,
        "graceful_shutdown_timeout_s": service.drain_s,
        "graceful_shutdown_wait_loop_s": 0.1,
        "health_check_period_s": 5,
        "ray_actor_options": {"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        "logging_config": _QUIET,
    }


def _scaled(replicas: Replicas, policy: AutoscalingPolicy) -> AutoscalingConfig:
    return AutoscalingConfig(
        min_replicas=replicas.min,
        max_replicas=replicas.max,
        metrics_interval_s=_REPORT_EVERY_S,
        look_back_period_s=_LOOK_BACK_S,
        # The policy itself decides when; Serve is not to wait on top of it.
        upscale_delay_s=0,
        downscale_delay_s=0,
        policy=policy,
    )


def _one_kind(replicas: Replicas, slo_s: float) -> AutoscalingPolicy:
    limits = {"least": replicas.min, "most": replicas.max, "slo_s": slo_s, "idle_s": replicas.idle_s}
    return AutoscalingPolicy(policy_function=on_serve.PATH, policy_kwargs=limits)


def _policy(service: Service, served: ServedModel, other: bool) -> AutoscalingPolicy:
    replicas, slo_s = served.replicas, served.slo_ms / 1000
    if len(served.kinds) == 1:
        return _one_kind(replicas, slo_s)
    return AutoscalingPolicy(
        policy_function=kinds_on_serve.PATH,
        policy_kwargs={
            "group": app_name(service, served),
            "kind": int(other),
            "terms": [[kind.min, kind.max, kind.price] for kind in served.kinds],
            "slo_s": slo_s,
            "idle_s": replicas.idle_s,
        },
    )
