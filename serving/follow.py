"""Follows an alias: looks for new entries of the registry's log, and loads what they point at.

That is the version in service, and the candidate of a trial where one is on (`cluster.trial`). A candidate
that is promoted is loaded already, so it is taken into service at once.

One look-up every `every_s` when nothing has changed. A version that can't be loaded leaves the old one
serving; it is tried again when the log moves on, or after a wait that doubles from 30 s to 10 min, since
a store may come back. A candidate that can't be loaded is not tried again: it is what the trial is there
to find out. Runs in a thread of its own, because looking and loading block.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import NotReady, StorageError, TandemError
from cluster.names import ModelRef
from cluster.registry import Entry, Registry, Version
from cluster.trial import Trial

logger = logging.getLogger("tandem.serving")

FIRST_RETRY_S = 30.0
LAST_RETRY_S = 600.0

T = TypeVar("T")


class Follower(Generic[T]):
    """Keeps one alias loaded.

    Args:
        registry: the registry to follow.
        ref: `MODEL@ALIAS`. A fixed version is looked up once and never moves.
        load: loads a version; what it raises means that it can't be served.
        swap: takes what `load` gave into service.
        failed: told of each version that couldn't be loaded, and of each look that failed (None).
        tried: told when a trial begins, steps or ends: the trial, its candidate, and why that one can't be
            loaded where it can't; None for all three at the end.
    """

    def __init__(
        self,
        registry: Registry,
        ref: ModelRef,
        *,
        load: Callable[[Version], T],
        swap: Callable[[T], None],
        failed: Callable[[Version | None, Exception], None],
        tried: Callable[[Trial | None, T | None, str | None], None] = lambda *_: None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._registry = registry
        self._ref = ref
        self._load = load
        self._swap = swap
        self._failed = failed
        self._tried = tried
        self._clock = clock
        self._known = 0
        self._version: int | None = None
        self._broken: Version | None = None
        self._retry_s = 0.0
        self._retry_at_s = 0.0
        self._trial: Trial | None = None
        self._candidate: tuple[int, T] | None = None
        self._entry_to_try: Entry | None = None
        """The entry whose trial wasn't looked at yet, or could not be for the moment."""
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def first(self) -> T:
        """Load what the alias points at now.

        Raises:
            NotFound: no such model, alias or version.
            TandemError: it can't be loaded.
        """
        newest = self._registry.newest(self._ref.model)
        # `resolve` knows how to say that there is no such model.
        version = self._registry.version(newest, self._ref) if newest else self._registry.resolve(self._ref)
        loaded = self._load(version)
        self._known, self._version = newest.number if newest else 0, version.version
        self._entry_to_try = newest
        return loaded

    def poll(self) -> None:
        """Look once, and load and swap if the alias has moved. Never raises."""
        try:
            newest = self._registry.newest(self._ref.model, self._known)
        except TandemError as error:
            self._failed(None, error)
            return
        if newest is not None:
            self._follow(newest)
        elif self._broken is not None and self._clock.monotonic_s() >= self._retry_at_s:
            self._try(self._broken)
        if self._entry_to_try is not None:
            self._follow_trial(self._entry_to_try)

    def start(self, every_s: float, each_time: Callable[[], None] = lambda: None) -> None:
        """Poll in a thread until `stop`, and call `each_time` after each look."""
        if self._ref.version is not None:
            return
        self._thread = threading.Thread(
            target=self._poll_for_ever, args=(every_s, each_time), name="tandem-follow", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after the look or the load that it is at."""
        self._stopping.set()

    def _poll_for_ever(self, every_s: float, each_time: Callable[[], None]) -> None:
        while not self._stopping.wait(every_s):
            self.poll()
            each_time()

    def _follow(self, newest: Entry) -> None:
        try:
            version = self._registry.version(newest, self._ref)
        except TandemError as error:
            self._failed(None, error)
            if isinstance(error, StorageError) and error.retryable:
                return  # `known` stays, so the next look finds the entry again
            self._known = newest.number
            return
        self._known = newest.number
        self._entry_to_try = newest
        self._broken, self._retry_s = None, FIRST_RETRY_S
        if version.version != self._version:
            self._try(version)

    def _try(self, version: Version) -> None:
        try:
            loaded = self._candidate_if(version.version) or self._load(version)
        except Exception as error:  # noqa: BLE001 - the old version must go on serving, whatever it is
            self._broken = version
            self._retry_at_s = self._clock.monotonic_s() + self._retry_s
            self._retry_s = min(self._retry_s * 2, LAST_RETRY_S)
            self._failed(version, error)
            return
        self._broken = None
        self._version = version.version
        self._swap(loaded)

    def _follow_trial(self, entry: Entry) -> None:
        """Take up, or end, the trial that stands in `entry`."""
        self._entry_to_try = None
        target = entry.aliases.get(self._ref.alias)
        trial = target.trial if target is not None else None
        if trial == self._trial:
            return
        if trial is None:
            self._trial, self._candidate = None, None
            self._tried(None, None, None)
            return
        loaded, broken = self._candidate_if(trial.version), None
        if loaded is None:
            try:
                version = self._registry.version(entry, ModelRef(self._ref.model, str(trial.version)))
                loaded = self._load(version)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the candidate's
                if isinstance(error, StorageError | NotReady) and error.retryable:
                    self._failed(None, error)
                    self._entry_to_try = (
                        entry  # the store's fault or for want of room, not the candidate's: look again
                    )
                    return
                broken = str(error).splitlines()[0] if str(error) else type(error).__name__
        self._trial = trial
        self._candidate = (trial.version, loaded) if loaded is not None else None
        self._tried(trial, loaded, broken)

    def _candidate_if(self, version: int) -> T | None:
        """The candidate that is loaded, if it is that version."""
        if self._candidate is not None and self._candidate[0] == version:
            return self._candidate[1]
        return None
