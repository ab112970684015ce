"""The windows of a plan, one after the other, each prepared while the one before it is used.

One thread prepares the window after the current, for which another has worked out the order.

Knows nothing of what is in a window.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from training.data.plan import Plan
from training.data.share import Share
from training.data.window import Order, Window, WindowReader, ordered

_PLANNED_AHEAD = 2


class WindowsAhead:
    """Windows of epochs 0 to `epochs`, asked for in order by one thread at a time. Close it."""

    def __init__(self, plan: Plan, share: Share, epochs: int, reader: WindowReader) -> None:
        self._plan = plan
        self._share = share
        self._epochs = epochs
        self._reader = reader
        self._planner = ThreadPoolExecutor(1, "tandem-plan")
        self._preparer = ThreadPoolExecutor(1, "tandem-window")
        self._orders: dict[tuple[int, int], Future[Order]] = {}
        self._windows: dict[tuple[int, int], Future[Window]] = {}

    def begin(self, epoch: int, position: int) -> None:
        """Prepare the window of a position, unless this was begun."""
        if not self._windows:
            bounds = self._plan.window_bounds(epoch)
            self._sent_for(epoch, int(np.searchsorted(bounds, position, side="right")) - 1)

    def window(self, epoch: int, number: int) -> Window:
        """A window; those before it are forgotten, the next is on its way.

        Raises:
            as `WindowReader.read`.
        """
        return self._sent_for(epoch, number).result()

    def stop(self) -> None:
        """Begin nothing more; who waits for a window gets an error. May be called twice."""
        for pool in (self._planner, self._preparer):
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Wait until both threads have ended, and forget everything. May be called twice."""
        for pool in (self._planner, self._preparer):
            pool.shutdown(wait=True, cancel_futures=True)
        self._orders.clear()
        self._windows.clear()

    def _sent_for(self, epoch: int, number: int) -> Future[Window]:
        keys = [(epoch, number)]
        for _ in range(_PLANNED_AHEAD):
            keys.append(self._following(*keys[-1]))
        for key in keys:
            if key not in self._orders and key[0] < self._epochs:
                self._orders[key] = self._planner.submit(ordered, self._plan, self._share, *key)
        for key in keys[:2]:
            if key not in self._windows and key[0] < self._epochs:
                self._windows[key] = self._preparer.submit(self._prepared, self._orders[key])
        self._windows = {key: window for key, window in self._windows.items() if key >= keys[0]}
        self._orders = {key: order for key, order in self._orders.items() if key >= keys[0]}
        return self._windows[epoch, number]

    def _following(self, epoch: int, number: int) -> tuple[int, int]:
        last = number + 2 == len(self._plan.window_bounds(epoch))
        return (epoch + 1, 0) if last else (epoch, number + 1)

    def _prepared(self, order: Future[Order]) -> Window:
        return self._reader.read(order.result())
