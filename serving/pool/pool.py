"""The models of one replica of a pool: loaded when they are asked for, evicted when others need the room.

What happens to a model: it is *cold*; a request makes it *load* (once, however many wait for it); it is
*hot*; and when the budget says so it is evicted, which takes a moment, and is cold again. A request pins its
model from its arrival to its answer; a load and a trial pin it too. The alias is followed while a model is
hot, and looked up anew at each load, so a model that comes back is the one of today.

Loads run in threads of their own, so that a slow store holds up nobody but those who wait for it. A load that
fails is that model's alone: it is told to those who wait, and for some seconds to those who come after,
since each try evicts others. A new version of a hot model is loaded beside the old one where it finds room
without waiting; where it doesn't, the old one serves on and the model is evicted once nobody uses it.

The size of a model is that of its servable's files: an estimate of its weights in memory. What ONNX Runtime
keeps besides (weights laid out for its kernels, its arena, the graph) isn't in it, nor what a load takes
while it runs; graphs from 8 MiB on are mapped, and shared by all replicas of the node.

Lives on one event loop. Knows neither HTTP nor Ray.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import NotFound, NotReady
from cluster.registry import Registry, Version
from cluster.storage import Store
from serving.kept import KeptModel
from serving.metrics import ReplicaMetrics
from serving.pool.budget import Budget, Grant
from serving.pool.size import files_bytes
from serving.replica import Loaded, Replica
from serving.runtimes.node_cache import NodeCache
from serving.service import ServedModel

logger = logging.getLogger("tandem.serving")

LOADS_AT_ONCE = 4
FAILED_FOR_S = 5.0
"""How long a failed load is told again before another try."""
_UNKNOWN_LOAD_S = 1.0


class _Unwanted(Exception):
    """A load was given up before it had room: nobody waited for it any more."""


class Hosted:
    """One model of the pool, hot or cold. Only `Pool` changes it."""

    def __init__(self, served: ServedModel, metrics: ReplicaMetrics) -> None:
        self.served = served
        self.name = served.ref.model
        self.metrics = metrics
        self.kept: KeptModel | None = None
        """Where it is hot; None while it is loading, being evicted, or cold."""
        self.loading: asyncio.Task[None] | None = None
        self.leaving: asyncio.Task[None] | None = None
        self.waiters = 0
        self.on_trial = False
        self.stale = False
        """Whether a newer version found no room beside it."""
        self.load_s: float | None = None
        """How long its last load took, the wait for room included."""
        self.load_began_s = 0.0
        self.error: Exception | None = None
        self.error_until_s = 0.0
        self.queued: dict[Grant, asyncio.Future[None]] = {}

    @property
    def replica(self) -> Replica | None:
        """What runs it, where it is hot."""
        return self.kept.replica if self.kept is not None else None


class Pool:
    """Many models in one replica. Made on the running event loop.

    Args:
        models: what the service says of each, with the pool's `replicas` as its own.
        metrics: for each of them, in the same order.
        limit_bytes: what they may hold together.
        follow_every_s: how often hot models' aliases are looked at.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        metrics: Sequence[ReplicaMetrics],
        store: Store,
        *,
        limit_bytes: int,
        follow_every_s: float,
        cache: NodeCache | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.budget = Budget(limit_bytes)
        self.hosted = {
            served.ref.model: Hosted(served, own) for served, own in zip(models, metrics, strict=True)
        }
        for own in metrics:
            own.pooled_bytes = 0
        self._store = store
        self._registry = Registry(store)
        self._follow_every_s = follow_every_s
        self._cache = cache
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(LOADS_AT_ONCE, thread_name_prefix="tandem-load")
        self._stopping = False

    def enter(self, name: str) -> None:
        """A request for the model has come: it stays, once loaded, until `leave`."""
        self.budget.enter(name)

    def leave(self, name: str) -> None:
        """The request was answered."""
        self.budget.leave(name)
        hosted = self.hosted[name]
        if hosted.stale and self.budget.drop(name):
            self._evict(name)
        if self._someone_waits():
            self._settle()

    async def hot(self, name: str, within_s: float) -> Replica:
        """The model's replica, loaded if need be. Between `enter` and `leave`.

        Args:
            within_s: how long the caller can wait. The load goes on without it, for the next one.

        Raises:
            NotReady: not in that time, or not at all; it says when to come back.
            NotFound: the model or its alias is gone.
        """
        hosted = self.hosted[name]
        if (replica := hosted.replica) is not None:
            return replica
        hosted.metrics.cold()
        end_s = self._clock.monotonic_s() + within_s
        hosted.waiters += 1
        try:
            while True:
                await self._wait_for_load(hosted, end_s)
                if (loaded := hosted.replica) is not None:
                    return loaded
        finally:
            hosted.waiters -= 1
            if not hosted.waiters:
                self._give_up_queueing(hosted)

    def check(self, name: str) -> None:
        """Raise why a cold model can't be loaded, where that was found out a moment ago."""
        hosted = self.hosted[name]
        if hosted.error is not None and self._clock.monotonic_s() < hosted.error_until_s:
            raise hosted.error

    async def stop(self) -> None:
        """Answer what is accepted, then let go of everything. Those who wait for a load are told so."""
        self._stopping = True
        for hosted in self.hosted.values():
            self._give_up_queueing(hosted)
        tasks = [t for h in self.hosted.values() for t in (h.loading, h.leaving) if t is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        kept = [h.kept for h in self.hosted.values() if h.kept is not None]
        for hosted in self.hosted.values():
            hosted.kept = None
        await asyncio.gather(*(one.stop() for one in kept))
        self._threads.shutdown(wait=False)

    async def _wait_for_load(self, hosted: Hosted, end_s: float) -> None:
        """Until the model's load ends, well or not; begins one where none is on."""
        if self._stopping:
            raise _stopping()
        self.check(hosted.name)
        if hosted.loading is None:
            hosted.load_began_s = self._clock.monotonic_s()
            hosted.loading = asyncio.create_task(self._load(hosted))
            hosted.loading.add_done_callback(partial(self._load_ended, hosted))
        task = hosted.loading
        # Not wait_for: it would cancel the load for the others.
        await asyncio.wait([task], timeout=max(0.0, end_s - self._clock.monotonic_s()))
        if not task.done():
            raise NotReady(
                "the model is being loaded, which takes longer than the request can wait",
                retry_after_s=self._retry_after_s(hosted),
                fix="try again, or give the request more time",
            )
        error = task.exception()
        if isinstance(error, Exception) and not isinstance(error, _Unwanted):
            raise _for_callers(hosted.name, error)

    async def _load(self, hosted: Hosted) -> None:
        if hosted.leaving is not None:
            await asyncio.wait([hosted.leaving])
        replica = Replica(hosted.served, self._store, hosted.metrics, self._cache, self._clock)
        on_trial = partial(self._pin_for_trial, hosted)
        load = partial(self._load_in_budget, hosted, replica)
        kept = KeptModel(replica, self._store, load=load, on_trial=on_trial)
        self.enter(hosted.name)  # those who wait may all go away meanwhile
        try:
            loaded = await self._loop.run_in_executor(self._threads, kept.first)
            hosted.load_s = self._clock.monotonic_s() - hosted.load_began_s
            hosted.error, hosted.stale = None, False
            if self._stopping:
                loaded.close()
                raise _stopping()
            kept.start(loaded, self._follow_every_s)
            hosted.kept = kept
        finally:
            self.leave(hosted.name)

    def _load_ended(self, hosted: Hosted, task: asyncio.Task[None]) -> None:
        hosted.loading = None
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception) and not isinstance(error, _Unwanted):
            hosted.error = _for_callers(hosted.name, error)
            hosted.error_until_s = self._clock.monotonic_s() + FAILED_FOR_S
            hosted.metrics.load_failed()
            logger.error("%s can't be loaded into the pool: %s", hosted.served.model, error)
        self._settle()

    def _load_in_budget(self, hosted: Hosted, replica: Replica, version: Version) -> Loaded:
        """Load a version once there is room for it; in a thread."""
        size_bytes = files_bytes(self._registry.servable(version)[0])
        beside = hosted.kept is not None
        grant = asyncio.run_coroutine_threadsafe(self._admit(hosted, size_bytes, beside), self._loop).result()
        if grant is None:
            if self._registry.resolve(hosted.served.ref).version == version.version:
                self._loop.call_soon_threadsafe(self._outdated, hosted)  # it is no mere candidate
            raise NotReady("no room in the pool beside the version in service", retry_after_s=1)
        try:
            loaded = replica.load(version)
        except BaseException:
            self._loop.call_soon_threadsafe(self._release, grant)
            raise
        finally:
            self._loop.call_soon_threadsafe(self.leave, hosted.name)
        loaded.on_close = partial(self._loop.call_soon_threadsafe, self._release, grant)
        return loaded

    def _outdated(self, hosted: Hosted) -> None:
        """A newer version has no room beside this one, so this one goes once nobody uses it."""
        hosted.stale = True
        if self.budget.drop(hosted.name):
            self._evict(hosted.name)

    async def _admit(self, hosted: Hosted, size_bytes: int, beside: bool) -> Grant | None:
        """Room for a version; the model is entered then, for as long as it loads. None: there is none now for
        one beside the version in service, without waiting for models in use.

        Raises:
            NotReady: never, as it is too large.
            _Unwanted: nobody waits for it any more.
        """
        name = hosted.name
        if self._stopping or not (beside or hosted.waiters):
            raise _Unwanted
        if beside and not self.budget.could_have(name, size_bytes):
            return None
        grant = self.budget.want(name, size_bytes)
        hosted.queued[grant] = future = self._loop.create_future()
        self.enter(name)
        try:
            self._settle()
            await future
        except BaseException:
            self.leave(name)
            raise
        return grant

    def _give_up_queueing(self, hosted: Hosted) -> None:
        for grant, future in list(hosted.queued.items()):
            if hosted.kept is None or self._stopping:
                del hosted.queued[grant]
                self.budget.withdraw(grant)
                future.set_exception(_Unwanted())

    def _settle(self) -> None:
        """Do what the budget says now."""
        if self._stopping:
            return
        step = self.budget.step()
        for grant in step.granted:
            hosted = self.hosted[grant.model]
            hosted.metrics.pooled_bytes = self.budget.bytes_of(grant.model)
            hosted.queued.pop(grant).set_result(None)
        for name in step.evict:
            self._evict(name)

    def _evict(self, name: str) -> None:
        hosted = self.hosted[name]
        kept, hosted.kept = hosted.kept, None
        hosted.metrics.evicted()
        logger.info("%s is evicted from the pool", hosted.served.model)
        if kept is not None:
            hosted.leaving = asyncio.create_task(kept.stop())
            hosted.leaving.add_done_callback(partial(self._left, hosted))

    def _left(self, hosted: Hosted, task: asyncio.Task[None]) -> None:
        hosted.leaving = None
        if not task.cancelled() and task.exception() is not None:
            logger.error("%s was not evicted cleanly", hosted.served.model, exc_info=task.exception())

    def _release(self, grant: Grant) -> None:
        self.budget.release(grant)
        self.hosted[grant.model].metrics.pooled_bytes = self.budget.bytes_of(grant.model)
        self._settle()

    def _pin_for_trial(self, hosted: Hosted, on: bool) -> None:
        if on != hosted.on_trial:
            hosted.on_trial = on
            (self.enter if on else self.leave)(hosted.name)

    def _someone_waits(self) -> bool:
        return any(hosted.queued for hosted in self.hosted.values())

    def _retry_after_s(self, hosted: Hosted) -> float:
        """How long the load should take yet, by its last one, or that of another model."""
        known = [h.load_s for h in self.hosted.values() if h.load_s is not None]
        usual_s = hosted.load_s or max(known, default=_UNKNOWN_LOAD_S)
        return max(1.0, usual_s - (self._clock.monotonic_s() - hosted.load_began_s))


def _stopping() -> NotReady:
    return NotReady("the replica is shutting down", retry_after_s=1, fix="try again")


def _for_callers(name: str, error: Exception) -> Exception:
    """What callers are told of a load that failed; the cause is the log's."""
    if isinstance(error, NotReady | NotFound):
        return error
    return NotReady(f"model '{name}' can't be loaded; the server's log says why", retry_after_s=FAILED_FOR_S)
