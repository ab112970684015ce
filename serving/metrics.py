"""What a replica counts, handed to Ray's metrics once a second.

A request only adds to plain counters (`serving.tally`), and a task passes the sums on; each node's agent
exposes them (as `ray_tandem_…`), whether or not there is a dashboard, and `serving.exposition` gathers all
nodes' for `/metrics`. `serving.metric_table` says which metrics there are.

Ray's own histograms take about 3 µs for every value and their agents rebuild them from the middles of
buckets, so ours go as counters, one a bucket, and are put together again on the page: exact sums, and a
flush costs the same however many requests there were.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

from cluster.errors import NotReady
from cluster.trial import Trial
from serving.account import Account
from serving.metric_table import LOAD_SECONDS, METRICS, ROWS, SECONDS
from serving.tally import Labels, Tally

FLUSH_EVERY_S = 1.0


class ReplicaMetrics:
    """One replica's counters, on one event loop; only `loaded` may be called from other threads."""

    def __init__(self, model: str) -> None:
        self.model = model
        self.queue_rows = 0
        self.queue_age_s = 0.0
        self.busy = 0.0
        self.pooled_bytes: int | None = None
        """What it holds of its pool; None where it is in none."""
        self._version = 0
        self._trial: Trial | None = None
        self._tally = Tally()
        self._scores: dict[str, tuple[int, float]] = {}
        self._loads: deque[tuple[float, int, int]] = deque()
        self._flushing: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    def answered(self, route: str, status: int, duration_s: float, account: Account) -> None:
        """An answer was sent."""
        tally, version = self._tally, account.version
        tally.counts["tandem_requests_total", (route, str(status), version)] += 1
        tally.distribution("tandem_request_seconds", (route, version), SECONDS).add(duration_s)
        if status == 429:
            self._count("tandem_shed_total", "tenant")
        if account.run_s:
            name, phase = "tandem_phase_seconds", tally.distribution
            phase(name, ("queue", version), SECONDS).add(account.queue_s)
            phase(name, ("decode", version), SECONDS).add(account.decode_s)
            phase(name, ("run", version), SECONDS).add(account.run_s)
            phase(name, ("encode", version), SECONDS).add(account.encode_s)

    def ran(self, rows: int, duration_s: float) -> None:
        """A batch ran."""
        self._count("tandem_rows_total", number=rows)
        self._count("tandem_batches_total")
        self._tally.distribution("tandem_batch_rows", (), ROWS).add(rows)
        self._tally.distribution("tandem_batch_seconds", (), SECONDS).add(duration_s)

    def dropped(self, tickets: int) -> None:
        """Requests ran out of time in the queue."""
        self._count("tandem_shed_total", "expired", number=tickets)
        self._count("tandem_deadline_misses_total", "queue", number=tickets)

    def refused(self, reason: str) -> None:
        """A request wasn't let in: `queue_full` or `deadline`."""
        self._count("tandem_shed_total", reason)

    def late(self) -> None:
        """A request ran, and was done after its deadline."""
        self._count("tandem_deadline_misses_total", "run")

    def failed(self, error: Exception) -> None:
        """A request got no answer from the model."""
        if isinstance(error, NotReady):
            self._count("tandem_shed_total", "stopping")

    def swapped(self, version: str) -> None:
        """A version was taken into service."""
        self._count("tandem_swaps_total")
        self._version = int(version)

    def loaded(self, duration_s: float, hits: int, misses: int) -> None:
        """A version was loaded, with so many hits and misses of the node's cache. For any thread."""
        self._loads.append((duration_s, hits, misses))

    def evicted(self) -> None:
        """The pool let go of it."""
        self._count("tandem_pool_evictions_total")

    def cold(self) -> None:
        """A request came for it while the pool hadn't loaded it."""
        self._count("tandem_pool_cold_requests_total")

    def load_failed(self) -> None:
        """A version couldn't be loaded, or the registry not be read."""
        self._count("tandem_load_failures_total")

    def trial(self, trial: Trial | None) -> None:
        """A trial begins, steps or, with None, ends."""
        before, self._trial = self._trial, trial
        if before is not None and (trial is None or trial.began != before.began):
            outcome = "promoted" if self._version == before.version else "abandoned"
            self._count("tandem_trials_ended_total", str(before.version), outcome)

    def candidate_failed(self, version: str) -> None:
        """The version in service had to answer for a candidate."""
        self._count("tandem_candidate_failures_total", version)

    def shadowed(self, version: str, rows: int, differing: int) -> None:
        """A shadow answered a copy."""
        self._count("tandem_shadow_rows_total", version, number=rows)
        if differing:
            self._count("tandem_shadow_differing_rows_total", version, number=differing)

    def scored(self, version: str, score: float) -> None:
        """A score came back for an answer of this version."""
        self._count("tandem_feedback_total", version)
        count, total = self._scores.get(version, (0, 0.0))
        self._scores[version] = (count + 1, total + score)

    def take(self) -> tuple[Tally, dict[tuple[str, Labels], float]]:
        """What was counted since the last call, and the gauges now."""
        while self._loads:
            duration_s, hits, misses = self._loads.popleft()
            self._tally.distribution("tandem_load_seconds", (), LOAD_SECONDS).add(duration_s)
            self._count("tandem_weight_cache_hits_total", number=hits)
            self._count("tandem_weight_cache_misses_total", number=misses)
        tally, self._tally = self._tally, Tally()
        gauges: dict[tuple[str, Labels], float] = {
            ("tandem_queue_rows", ()): self.queue_rows,
            ("tandem_queue_age_seconds", ()): self.queue_age_s,
            ("tandem_busy_ratio", ()): self.busy,
            ("tandem_model_version", ()): self._version,
        }
        if self.pooled_bytes is not None:
            gauges["tandem_pool_loaded", ()] = 1.0 if self.pooled_bytes else 0.0
            gauges["tandem_pool_bytes", ()] = self.pooled_bytes
        if (trial := self._trial) is not None:
            gauges["tandem_trial_percent", (str(trial.version), trial.mode)] = trial.percent
            gauges["tandem_trial_step", (str(trial.version), trial.mode)] = trial.step
        for version, (count, total) in self._scores.items():
            gauges["tandem_feedback_score_mean", (version,)] = total / count
        return tally, gauges

    def start(self) -> None:
        """Hand the counters to Ray every second until `stop`."""
        self._flushing = asyncio.get_running_loop().create_task(self._flush_for_ever(_Exporter(self.model)))

    async def stop(self) -> None:
        """Hand over what is left."""
        if self._flushing is not None:
            self._stopping.set()
            await self._flushing

    def _count(self, name: str, *labels: str, number: int = 1) -> None:
        self._tally.counts[name, labels] += number

    async def _flush_for_ever(self, exporter: _Exporter) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), FLUSH_EVERY_S)
            # Taken here, on the loop; recorded in a thread, because hundreds of values take a millisecond.
            await asyncio.to_thread(exporter.export, *self.take())
            if self._stopping.is_set():
                return


class _Exporter:
    """The same counters as Ray's metrics."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._made: dict[str, Any] = {}

    def export(self, tally: Tally, gauges: dict[tuple[str, Labels], float]) -> None:
        for (name, labels), number in tally.counts.items():
            self._add(name, name, labels, number)
        for (name, labels), values in tally.distributions.items():
            for le, number in values.cumulative():
                self._add(f"{name}_bucket", name, labels, number, le)
            self._add(f"{name}_sum", name, labels, values.total)
            self._add(f"{name}_count", name, labels, values.count)
        for (name, labels), value in gauges.items():
            self._metric(name, name, ()).set(value, tags=self._tags(name, labels))

    def _add(self, series: str, name: str, labels: Labels, number: float, le: str = "") -> None:
        tags = self._tags(name, labels) | ({"le": le} if le else {})
        if number > 0:  # Ray takes no other
            self._metric(series, name, ("le",) if le else ()).inc(number, tags=tags)

    def _tags(self, name: str, labels: Labels) -> dict[str, str]:
        return {"model": self._model, **dict(zip(METRICS[name].labels, labels, strict=True))}

    def _metric(self, series: str, name: str, more: tuple[str, ...]) -> Any:
        if series not in self._made:
            from ray.util.metrics import Counter, Gauge

            kind = Gauge if METRICS[name].kind == "gauge" else Counter
            tag_keys = ("model", *METRICS[name].labels, *more)
            self._made[series] = kind(series, METRICS[name].text, tag_keys=tag_keys)
        return self._made[series]
