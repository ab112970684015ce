"""A replica of the pool, as Ray Serve runs it."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from ray import serve

from cluster.storage import open_store
from serving import collector, lane
from serving.exposition import Scraper
from serving.http import HttpApp
from serving.key_watch import KeyWatch, watch_keys
from serving.metrics import ReplicaMetrics
from serving.model_app import ModelApp
from serving.on_node import log_file, node_cache
from serving.passing import forward_to, not_running, signatures
from serving.pool.app import PoolApp
from serving.pool.load import summed
from serving.pool.pool import Pool
from serving.replica import Replica
from serving.request_log import RequestLog
from serving.scaling.report import written
from serving.service import Service
from serving.tracing import Spans, open_spans


@serve.ingress()
class PoolServer:
    """Many models, and what the front of a service does besides."""

    async def __init__(self, service: dict[str, Any]) -> None:  # type: ignore[misc] # Serve awaits it
        self._service = whole = Service.model_validate(service)
        assert whole.pool is not None, "a service without a pool"
        self._cpus = whole.pool.replicas.cpus
        loop = asyncio.get_running_loop()
        self._watch = await asyncio.to_thread(watch_keys, whole, loop, _count_replicas)
        models = [served.model_copy(update={"replicas": whole.pool.replicas}) for served in whole.pooled]
        self._metrics = [ReplicaMetrics(served.ref.model) for served in models]
        self._store = open_store(whole.store)
        self._pool = Pool(
            models,
            self._metrics,
            self._store,
            limit_bytes=whole.pool.memory_bytes,
            follow_every_s=whole.follow_every_s,
            cache=node_cache(whole),
        )
        self._logs: dict[str, RequestLog] = {}
        self._spans: dict[str, Spans | None] = {}
        for metrics in self._metrics:
            metrics.start()
            self._logs[metrics.model] = log = RequestLog(log_file(metrics.model), whole.log, metrics.model)
            log.start()
            self._spans[metrics.model] = open_spans(whole.tracing, metrics.model)

    def __serve_build_asgi_app__(self) -> HttpApp:
        service = self._service
        app = _PoolApp(
            self._pool,
            self._store,
            self._app_of,
            describe_every_s=service.follow_every_s,
            models={served.ref.model: forward_to(service, served) for served in service.own},
            not_ready=partial(not_running, service),
            signatures=partial(signatures, service),
            scrape=Scraper(),
            max_body_bytes=max(served.max_body_bytes for served in service.models),
            guard=self._watch.guard if self._watch else None,
        )
        app.take_down_with_it(self._watch, self._metrics, self._logs, self._spans)
        lane.enter(app)
        collector.settle()
        return app

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What `serving.scaling.on_serve` reads."""
        replicas = [hosted.replica for hosted in self._pool.hosted.values()]
        loads = [replica.load_now for replica in replicas if replica is not None]
        return written(summed([load for load in loads if load is not None], self._cpus))

    def _app_of(self, replica: Replica) -> ModelApp:
        metrics = replica.metrics
        log, spans = self._logs[metrics.model], self._spans[metrics.model]
        return ModelApp(replica, metrics, _no_page, log=log, spans=spans)


class _PoolApp(PoolApp):
    """Takes the rest of the replica down with it."""

    def take_down_with_it(
        self,
        watch: KeyWatch | None,
        metrics: list[ReplicaMetrics],
        logs: dict[str, RequestLog],
        spans: dict[str, Spans | None],
    ) -> None:
        """What is to end when the server has stopped."""
        self._watch, self._metrics_of_all, self._logs, self._spans = watch, metrics, logs, spans

    async def closed(self) -> None:
        lane.leave()
        if self._watch is not None:
            self._watch.stop()
        await self._pool.stop()
        await asyncio.gather(*(metrics.stop() for metrics in self._metrics_of_all))
        for log in self._logs.values():
            await asyncio.to_thread(log.stop)
        for spans in self._spans.values():
            if spans is not None:
                await asyncio.to_thread(spans.stop)


def _count_replicas() -> int:
    """How many replicas of the pool run now."""
    own = serve.get_replica_context()
    deployments = serve.status().applications[own.app_name].deployments
    return int(deployments[own.deployment].replica_states.get("RUNNING", 1))


async def _no_page() -> bytes:
    """Metrics are the server's, not a model's: nobody asks here."""
    return b""
