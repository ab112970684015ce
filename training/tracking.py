"""Figures of a run to the trackers that people already look at: TensorBoard, MLflow.

The loop hands figures over and goes on; a thread of this module writes them, every half minute. A
tracker that is slow makes figures queue up, then the oldest are dropped; one that fails loses what it
was given, which is told once, and gets what comes later. So none can stall or end a run, and at the end
they get a few seconds, no more.

Imports nothing of a tracker before there is something to write, half a minute into a run.
Knows nothing of any tracker in particular (training.trackers).
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple, Protocol

from cluster.clock import SYSTEM_CLOCK, Clock

WRITE_EVERY_S = 30.0
AT_MOST_EVERY_S = 1.0
"""Figures that come sooner after the last ones are left out: a tracker is for people."""
CLOSED_WITHIN_S = 5.0
_WAITING_AT_MOST = 3600


class Point(NamedTuple):
    """Figures of one step."""

    at: datetime
    step: int
    figures: Mapping[str, float]


class Tracker(Protocol):
    """Where figures go. Called from one thread; may raise anything."""

    name: str

    def write(self, points: Sequence[Point]) -> None:
        """Write these, in order; a step may come again after a rollback."""
        ...

    def close(self, finished: bool) -> None:
        """Nothing more comes from here; `finished` where the run has got its result."""
        ...


class Tracking:
    """The trackers of one attempt. `log` and `close` never raise, and `log` never waits.

    Args:
        openers: each gives a tracker, in the tracking thread; None where it isn't installed.
        on_error: told once of each tracker that fails, in the tracking thread; it must not raise.
    """

    def __init__(
        self,
        openers: Sequence[Callable[[], Tracker | None]],
        on_error: Callable[[str], None],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._openers = openers
        self._on_error = on_error
        self._clock = clock
        self._points: deque[Point] = deque(maxlen=_WAITING_AT_MOST)
        self._logged_s = -math.inf
        self._finished = False
        self._failed: set[str] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    def log(self, step: int, **figures: float | None) -> None:
        """Hand over the figures of a step, at most once a second; what isn't a finite number is left out."""
        now_s = self._clock.monotonic_s()
        if now_s - self._logged_s < AT_MOST_EVERY_S:
            return
        finite = {name: float(x) for name, x in figures.items() if x is not None and math.isfinite(x)}
        if finite:
            self._points.append(Point(self._clock.wall(), step, finite))
            self._logged_s = now_s

    def close(self, *, finished: bool = False, timeout_s: float = CLOSED_WITHIN_S) -> None:
        """Have what is left written, waiting a few seconds at most."""
        self._finished = finished
        self._closing.set()
        self._thread.join(timeout_s)

    def _work(self) -> None:
        trackers: list[Tracker] | None = None
        closing = False
        while not closing:
            closing = self._closing.wait(WRITE_EVERY_S)
            points = [self._points.popleft() for _ in range(len(self._points))]
            if points:
                trackers = self._open() if trackers is None else trackers
                for tracker in trackers:
                    self._attempt(tracker.name, _writing(tracker, points))
        for tracker in trackers or []:
            self._attempt(tracker.name, _closing(tracker, self._finished))

    def _open(self) -> list[Tracker]:
        opened: list[Tracker] = []
        for opener in self._openers:

            def keep(open_one: Callable[[], Tracker | None] = opener) -> None:
                if (tracker := open_one()) is not None:
                    opened.append(tracker)

            self._attempt("a tracker", keep)
        return opened

    def _attempt(self, name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # noqa: BLE001 - other people's code, whose failures are not the run's
            if name not in self._failed:
                self._failed.add(name)
                said = (str(error).splitlines() or [""])[0][:200]
                self._on_error(f"{name} did not take figures: {type(error).__name__}: {said}")


def _writing(tracker: Tracker, points: Sequence[Point]) -> Callable[[], None]:
    return lambda: tracker.write(points)


def _closing(tracker: Tracker, finished: bool) -> Callable[[], None]:
    return lambda: tracker.close(finished)
