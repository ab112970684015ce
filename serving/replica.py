"""A model, loaded and answering: load, verify, warm, run, swap, drain.

A swap loads the new version beside the old one; while a trial is on, its candidate stays beside it
(`serving.rollout`). Each request runs on the version that checked it, so one that came before the swap
finishes on the old version, and no batch and no answer mixes two; a version is closed when its last
request is answered.

Knows neither HTTP nor Ray. Lives on one event loop; only `load` is called from other threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import NotReady
from cluster.registry import Registry, Version
from cluster.storage import Store
from serving.account import Account
from serving.batching.executor import Executor
from serving.batching.model import BatchModel
from serving.batching.run import Answer
from serving.batching.ticket import NORMAL
from serving.load import Load
from serving.metrics import ReplicaMetrics
from serving.protocol.codec import Codec
from serving.protocol.limits import Limits
from serving.protocol.requests import Arrays, InferRequest
from serving.rollout.evidence import Side
from serving.rollout.tried import Tried
from serving.runtimes import load_runtime
from serving.runtimes.base import Runtime
from serving.runtimes.node_cache import NodeCache
from serving.service import ServedModel
from serving.yielding import yielding

logger = logging.getLogger("tandem.serving")

_TICK_S = 0.25


@dataclass(slots=True, eq=False)
class Loaded:
    """A version that is ready to run."""

    version: Version
    codec: Codec
    model: BatchModel
    requests: int = 0
    """Requests that were checked by it and aren't answered yet."""
    on_close: Callable[[], object] | None = None
    """Told when its memory is free again."""
    closed: bool = False

    @property
    def name(self) -> str:
        """The version as protocols and headers write it."""
        return str(self.version.version)

    @property
    def runtime(self) -> Runtime:
        """What runs it."""
        return self.model.runtime

    def close(self) -> None:
        """Let go of its memory, if that wasn't done. Nothing may be run on it afterwards."""
        if self.closed:
            return
        self.closed = True
        self.runtime.close()
        if self.on_close is not None:
            self.on_close()


class Replica:
    """One replica of one model.

    Args:
        served: what the service says of the model.
        store: where the registry and the servables are.
        metrics: told of batches, swaps and drops.
        cache: where large graphs lie for all replicas of this node.
    """

    def __init__(
        self,
        served: ServedModel,
        store: Store,
        metrics: ReplicaMetrics,
        cache: NodeCache | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.served = served
        self._store = store
        self.metrics = metrics
        self._cache = cache
        self._clock = clock
        self._serving: Loaded | None = None
        self.tried: Tried[Loaded] | None = None
        """The trial that is on."""
        self._executor: Executor | None = None
        self._ticking: asyncio.Task[None] | None = None

    @property
    def serving(self) -> Loaded:
        """The version that new requests get.

        Raises:
            NotReady: none is loaded yet.
        """
        if self._serving is None:
            raise NotReady("the model is being loaded", retry_after_s=1, fix="try again")
        return self._serving

    @property
    def waiting_rows(self) -> int:
        """Rows in the queue."""
        return self._executor.waiting_rows if self._executor else 0

    @property
    def load_now(self) -> Load | None:
        """How busy it is; None before it serves."""
        return self._executor.load() if self._executor else None

    @property
    def _threads(self) -> int:
        """Of one batch."""
        return max(1, int(self.served.replicas.cpus))

    def load(self, version: Version) -> Loaded:
        """Read, verify and warm a version. Blocks; touches nothing that serves.

        Raises:
            Damaged, NotFound, StorageError: it can't be served.
        """
        # A runtime's own threads are made while it loads, and would stay at the lower priority.
        if self._serving is not None and self._threads == 1:
            return yielding(lambda: self._load(version))
        return self._load(version)

    def _load(self, version: Version) -> Loaded:
        began_s, cache = self._clock.monotonic_s(), self._cache
        before = (cache.hits, cache.misses) if cache is not None else (0, 0)
        manifest, signature = Registry(self._store).servable(version)
        threads = self._threads
        runtime = load_runtime(self._store, manifest, signature, threads=threads, cache=cache)
        model = BatchModel(runtime, signature)
        model.measure(self.served.max_batch_size, self._clock)
        after = (cache.hits, cache.misses) if cache is not None else (0, 0)
        self.metrics.loaded(self._clock.monotonic_s() - began_s, after[0] - before[0], after[1] - before[1])
        limits = Limits(max_body_bytes=self.served.max_body_bytes, max_rows=self.served.max_queue_rows)
        return Loaded(version, Codec(signature, version.model, limits), model)

    def start(self, loaded: Loaded) -> None:
        """Begin to serve, on the running event loop."""
        self._executor = Executor(
            max_batch_size=self.served.max_batch_size,
            max_queue_rows=self.served.max_queue_rows,
            slo_s=self.served.slo_ms / 1000,
            observer=self.metrics,
            clock=self._clock,
        )
        self._ticking = asyncio.get_running_loop().create_task(self._tick())
        self.swap(loaded)

    def show(self, described: Loaded) -> None:
        """Answer questions about a version, and run none: this is a replica that is never started."""
        self._serving = described

    def swap(self, loaded: Loaded) -> None:
        """Give new requests this version. Those that are queued or running keep theirs."""
        before, self._serving = self._serving, loaded
        self.metrics.swapped(loaded.name)
        if before is not None:
            logger.info("%s: version %s follows %s", self.served.model, loaded.name, before.name)
            if self.tried is None or self.tried.candidate is not loaded:
                loaded.model.take_after(before.model)
            self._close_if_idle(before)

    def try_candidate(self, tried: Tried[Loaded] | None) -> None:
        """A trial begins, steps or, with None, ends."""
        before, self.tried = self.tried, tried
        known = before.candidate if before is not None else None
        self._compare_batches(tried, begins=tried is not None and tried.candidate is not known)
        self.metrics.trial(tried.trial if tried is not None else None)
        if before is not None and before.candidate is not None:
            self._close_if_idle(before.candidate)

    def _compare_batches(self, tried: Tried[Loaded] | None, *, begins: bool) -> None:
        """Count, while a trial is on, how long the batches of both versions take."""
        stable = self._serving
        if stable is None:
            return
        stable.model.seen = None
        if tried is None or tried.candidate is None:
            return
        if begins:
            tried.candidate.model.take_after(stable.model)

        def beside(side: Side) -> Callable[[int, int, float], None]:
            def seen(rows: int, length: int, took_s: float) -> None:
                usual_s = stable.model.latency.estimate_s(rows, length)
                if usual_s > 0:
                    side.took(took_s / usual_s)

            return seen

        stable.model.seen = beside(tried.evidence.stable)
        tried.candidate.model.seen = beside(tried.evidence.candidate)

    @contextmanager
    def lease(self, loaded: Loaded | None = None) -> Iterator[Loaded]:
        """A version kept open until the `with` ends: parse, run and render by it.

        Args:
            loaded: the version in service where it isn't given.

        Raises:
            NotReady: none is loaded yet.
        """
        loaded = loaded or self.serving
        loaded.requests += 1
        try:
            yield loaded
        finally:
            loaded.requests -= 1
            self._close_if_idle(loaded)

    async def infer(
        self,
        loaded: Loaded,
        request: InferRequest,
        deadline_s: float,
        priority: int = NORMAL,
        *,
        account: Account | None = None,
    ) -> Arrays:
        """Run a request on the version that checked it, which must be leased.

        Args:
            deadline_s: on the replica's clock.
            priority: its level, as `serving.batching.ticket` has them.
            account: told how long it waited and ran.

        Raises:
            Overloaded, DeadlineExceeded: it wasn't run.
            Exception: what the model raised on it.
        """
        assert self._executor is not None, "start() comes first"
        outcome = await self._executor.submit(
            loaded.model, request.inputs, request.rows, deadline_s, level=priority, account=account
        )
        if isinstance(outcome, Answer):
            return outcome.outputs
        self.metrics.failed(outcome.error)
        raise outcome.error

    async def stop(self) -> None:
        """Answer what is accepted, then let go of everything."""
        if self._executor is not None:
            await self._executor.close()
        if self._ticking is not None:
            self._ticking.cancel()
        self.try_candidate(None)
        if self._serving is not None:
            self._serving.close()
            self._serving = None

    def _close_if_idle(self, loaded: Loaded) -> None:
        candidate = self.tried.candidate if self.tried is not None else None
        if loaded.requests == 0 and loaded is not self._serving and loaded is not candidate:
            loaded.close()

    async def _tick(self) -> None:
        """Drop the expired while a long batch runs, and keep the gauges fresh."""
        while True:
            await asyncio.sleep(_TICK_S)
            if self._executor is not None:
                self._executor.drop_expired()
                load = self._executor.load()
                self.metrics.queue_rows = self._executor.waiting_rows
                self.metrics.queue_age_s, self.metrics.busy = load.oldest_waiting_s, load.busy_fraction
