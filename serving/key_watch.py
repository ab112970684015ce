"""Keeps a door's tenants fresh: a thread that looks at the log of keys, and counts the replicas.

A store that is out of reach changes nothing: who had a key has it still, and who was revoked meanwhile is
found out when the store is back.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

from cluster.errors import TandemError
from cluster.keys import Keys
from cluster.storage import open_store
from serving.guard import Guard
from serving.service import Service

logger = logging.getLogger("tandem.serving")

COUNT_EVERY_S = 5.0
"""Counting replicas asks Serve's controller, so it is done this rarely, and only where a limit is set."""


class KeyWatch:
    """The door, and who keeps it.

    Args:
        keys: the store's tenants; they are read here once, so the caller's thread blocks.
        on_loop: runs a function on the event loop that the door lives on.
        replicas: how many replicas share the limits; None where there is one.

    Raises:
        StorageError: the tenants can't be read.
    """

    def __init__(
        self,
        keys: Keys,
        *,
        on_loop: Callable[..., Any],
        replicas: Callable[[], int] | None = None,
    ) -> None:
        self._keys = keys
        self._on_loop = on_loop
        self._replicas = replicas
        self._stopping = threading.Event()
        self._known = 0
        self.guard = Guard()
        if (newest := keys.newest()) is not None:
            self._known = newest.number
            self.guard.replace(newest.tenants)
        else:
            logger.warning("callers need a key, and there are none yet: tandem keys create TENANT")

    def start(self, every_s: float) -> None:
        """Look every `every_s` until `stop`."""
        thread = threading.Thread(target=self._run, args=(every_s,), name="tandem-keys", daemon=True)
        thread.start()

    def stop(self) -> None:
        """End the thread, after the look that it is at."""
        self._stopping.set()

    def look(self) -> None:
        """Look once. Never raises."""
        try:
            newest = self._keys.newest(self._known)
        except TandemError as error:
            logger.warning("the log of keys can't be read, the known ones hold on: %s", error)
            return
        if newest is not None:
            self._known = newest.number
            self._on_loop(self.guard.replace, newest.tenants)

    def count(self) -> None:
        """Count the replicas once. Never raises."""
        if self._replicas is None or not self.guard.limits_anyone:
            return
        try:
            self._on_loop(self.guard.share_with, self._replicas())
        except Exception:
            logger.warning("the replicas can't be counted, the last count holds", exc_info=True)

    def _run(self, every_s: float) -> None:
        looks_a_count = max(1, round(COUNT_EVERY_S / every_s))
        looks = 0
        while not self._stopping.wait(every_s):
            self.look()
            if looks % looks_a_count == 0:
                self.count()
            looks += 1


def watch_keys(
    service: Service, loop: asyncio.AbstractEventLoop, replicas: Callable[[], int] | None
) -> KeyWatch | None:
    """The door of a service that asks for keys. Blocks while it reads the store."""
    if service.keys == "off":
        return None
    store = open_store(service.store)
    watch = KeyWatch(Keys(store), on_loop=loop.call_soon_threadsafe, replicas=replicas)
    watch.start(service.follow_every_s)
    return watch
