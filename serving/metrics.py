"""What a replica counts, handed to Ray's metrics once a second.

Recording a value with `ray.util.metrics` takes about 3 µs, so a request only adds to plain counters, and a
task passes them on. Each node's agent then exposes them (as `ray_tandem_…`), whether or not there is a
dashboard; `serving.exposition` gathers all nodes' for `/metrics`.

    tandem_requests_total{model,route,status}      answers sent
    tandem_request_seconds{model,route}            from the request's headers to its answer
    tandem_batch_rows{model}                       rows per batch that ran
    tandem_batch_seconds{model}                    how long a batch ran
    tandem_rows_total{model}                       rows that ran
    tandem_batches_total{model}                    batches that ran
    tandem_queue_rows{model}                       rows waiting now
    tandem_shed_total{model}                       refused: the queue was full
    tandem_expired_total{model}                    dropped: their time ran out before they ran
    tandem_swaps_total{model}                      versions taken into service
    tandem_load_failures_total{model}              versions, or looks at the registry, that failed
    tandem_model_version{model}                    the version in service

Ray's agents rebuild a histogram from the middles of its buckets, so its `_sum` is only near the truth; rows
and batches are counted besides, for an exact mean.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any

from cluster.errors import Overloaded

FLUSH_EVERY_S = 1.0
SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024]


class ReplicaMetrics:
    """One replica's counters, on one event loop."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.queue_rows = 0
        self._version = 0
        self._requests: Counter[tuple[str, int]] = Counter()
        self._counts: Counter[str] = Counter()
        self._request_s: list[tuple[str, float]] = []
        self._batches: list[tuple[int, float]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    def answered(self, route: str, status: int, duration_s: float) -> None:
        """An answer was sent."""
        self._requests[(route, status)] += 1
        self._request_s.append((route, duration_s))

    def ran(self, rows: int, duration_s: float) -> None:
        """A batch ran."""
        self._counts["rows"] += rows
        self._counts["batches"] += 1
        self._batches.append((rows, duration_s))

    def dropped(self, tickets: int) -> None:
        """Requests ran out of time in the queue."""
        self._counts["expired"] += tickets

    def failed(self, error: Exception) -> None:
        """A request got no answer from the model."""
        if isinstance(error, Overloaded):
            self._counts["shed"] += 1

    def swapped(self, version: str) -> None:
        """A version was taken into service."""
        self._counts["swaps"] += 1
        self._version = int(version)

    def load_failed(self) -> None:
        """A version couldn't be loaded, or the registry not be read."""
        self._counts["load_failures"] += 1

    def start(self) -> None:
        """Hand the counters to Ray every second until `stop`."""
        self._flushing = asyncio.get_running_loop().create_task(self._flush_for_ever(_Exporter(self.model)))

    async def stop(self) -> None:
        """Hand over what is left."""
        if self._flushing is not None:
            self._stopping.set()
            await self._flushing

    async def _flush_for_ever(self, exporter: _Exporter) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), FLUSH_EVERY_S)
            # Taken here, on the loop; recorded in a thread, because thousands of values take milliseconds.
            requests, self._requests = self._requests, Counter()
            counts, self._counts = self._counts, Counter()
            request_s, self._request_s = self._request_s, []
            batches, self._batches = self._batches, []
            await asyncio.to_thread(
                exporter.export, requests, counts, request_s, batches, self.queue_rows, self._version
            )
            if self._stopping.is_set():
                return


class _Exporter:
    """The same counters as Ray's metrics."""

    def __init__(self, model: str) -> None:
        from ray.util.metrics import Counter as RayCounter
        from ray.util.metrics import Gauge, Histogram

        def tagged(metric: Any) -> Any:
            return metric.set_default_tags({"model": model})

        def counter(name: str, text: str, *tags: str) -> Any:
            return tagged(RayCounter(f"tandem_{name}_total", text, tag_keys=("model", *tags)))

        def histogram(name: str, text: str, boundaries: list[float], *tags: str) -> Any:
            return tagged(Histogram(f"tandem_{name}", text, boundaries, tag_keys=("model", *tags)))

        def gauge(name: str, text: str) -> Any:
            return tagged(Gauge(f"tandem_{name}", text, tag_keys=("model",)))

        self._requests = counter("requests", "Answers sent", "route", "status")
        self._request_s = histogram("request_seconds", "Time to answer", SECONDS, "route")
        self._batch_rows = histogram("batch_rows", "Rows per batch", [float(n) for n in ROWS])
        self._batch_s = histogram("batch_seconds", "Time a batch ran", SECONDS)
        self._queue_rows = gauge("queue_rows", "Rows waiting")
        self._version = gauge("model_version", "Version in service")
        self._counts = {
            "rows": counter("rows", "Rows that ran"),
            "batches": counter("batches", "Batches that ran"),
            "shed": counter("shed", "Requests refused because the queue was full"),
            "expired": counter("expired", "Requests whose time ran out in the queue"),
            "swaps": counter("swaps", "Versions taken into service"),
            "load_failures": counter("load_failures", "Versions or looks at the registry that failed"),
        }

    def export(
        self,
        requests: Counter[tuple[str, int]],
        counts: Counter[str],
        request_s: list[tuple[str, float]],
        batches: list[tuple[int, float]],
        queue_rows: int,
        version: int,
    ) -> None:
        for (route, status), number in requests.items():
            self._requests.inc(number, tags={"route": route, "status": str(status)})
        for name, number in counts.items():
            if number:
                self._counts[name].inc(number)
        tags = {route: {"route": route} for route, _ in request_s}
        for route, duration_s in request_s:
            self._request_s.observe(duration_s, tags=tags[route])
        for rows, duration_s in batches:
            self._batch_rows.observe(rows)
            self._batch_s.observe(duration_s)
        self._queue_rows.set(queue_rows)
        self._version.set(version)
