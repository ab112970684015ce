"""A model that a replica keeps: loaded, swapped as its alias moves, its trials judged, and at last let go.

Ties together what each knows only its own part: `Replica` runs versions on the event loop, `Follower` looks
at the registry in a thread, `Jury` judges trials there. Knows neither HTTP nor Ray Serve.
"""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Callable

from cluster.registry import Registry, Version
from cluster.storage import Store
from cluster.trial import Trial
from serving.follow import Follower
from serving.replica import Loaded, Replica
from serving.rollout.evidence import Evidence
from serving.rollout.jury import Jury
from serving.rollout.tried import Tried

logger = logging.getLogger("tandem.serving")


class KeptModel:
    """One model on one replica. Made, started and stopped on the running event loop.

    Args:
        replica: it runs the model.
        store: where the registry is.
        load: loads a version, in a thread; the replica's own `load` where it isn't given.
        on_trial: told, on the event loop, whether a trial is on.
    """

    def __init__(
        self,
        replica: Replica,
        store: Store,
        *,
        load: Callable[[Version], Loaded] | None = None,
        on_trial: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self.replica = replica
        self._on_trial = on_trial
        self._loop = asyncio.get_running_loop()
        self._jury = Jury(store, replica.served.ref, secrets.token_hex(8))
        self._stopped = False
        self._follower = Follower(
            Registry(store),
            replica.served.ref,
            load=load or replica.load,
            swap=lambda loaded: self._soon(self._swap, loaded),
            failed=self._failed,
            tried=self._tried,
        )

    def first(self) -> Loaded:
        """Load what the alias points at. Blocks.

        Raises:
            TandemError: it can't be loaded.
        """
        return self._follower.first()

    def start(self, loaded: Loaded, every_s: float) -> None:
        """Serve it, and follow the alias."""
        self.replica.start(loaded)
        self._follower.start(every_s, self._sit)

    async def stop(self) -> None:
        """Answer what is accepted, then let go of everything."""
        self._stopped = True
        self._follower.stop()
        await self.replica.stop()

    def _swap(self, loaded: Loaded) -> None:
        if self._stopped:
            loaded.close()  # it was on its way when we stopped
        else:
            self.replica.swap(loaded)

    def _failed(self, version: Version | None, error: Exception) -> None:
        if self._stopped:
            return
        what = f"version {version.version}" if version else "the registry"
        name = self.replica.served.model
        logger.error("%s: %s can't be read, the old version serves on: %s", name, what, error)
        self._soon(self.replica.metrics.load_failed)

    def _tried(self, trial: Trial | None, candidate: Loaded | None, broken: str | None) -> None:
        step = Tried(trial, candidate, broken, start=random.random()) if trial is not None else None
        self._soon(self._take_step, step)

    def _take_step(self, step: Tried[Loaded] | None) -> None:
        if self._stopped:
            if step is not None and step.candidate is not None:
                step.candidate.close()
            return
        self.replica.try_candidate(step)
        self._on_trial(step is not None)

    def _sit(self) -> None:
        step = self.replica.tried
        if step is not None and not self._stopped:
            seen = asyncio.run_coroutine_threadsafe(_snapshot(step), self._loop).result()
            self._jury.sit(step.trial, seen, step.lasted_s)

    def _soon(self, function: Callable[..., None], *args: object) -> None:
        self._loop.call_soon_threadsafe(function, *args)


async def _snapshot(step: Tried[Loaded]) -> Evidence:
    """A copy of what was seen, taken on the event loop."""
    return step.snapshot()
