"""What happens in a run, as JSON lines in the store: steps, checkpoints, failures, accounts, results.

Object stores can't append, so a writer buffers and writes numbered segments under a name of its own
(`events/ATTEMPT-00001.jsonl`); `tandem logs RUN --json` prints them as one stream. Losing the last few
seconds of events at a crash loses no data: nothing is decided from events. So a reader passes over what
is damaged, and says so with an event of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import NotFound, StorageError
from cluster.storage import Store

FLUSH_EVERY_S = 5.0
FLUSH_AT_LEAST_EVERY_S = 60.0
FLUSHED_WITHIN_S = 10.0
_SEGMENTS_AT_ONCE = 32

Event = dict[str, Any]


class EventWriter:
    """Writes events of one attempt. `writer` must be unique to the process, e.g. `TIME-rank0`.

    Safe to use from several threads. `write` never waits for the store.
    """

    def __init__(self, store: Store, prefix: str, writer: str, clock: Clock = SYSTEM_CLOCK) -> None:
        self._store = store
        self._key = f"{prefix}/events/{writer}-{{:05d}}.jsonl"
        self._clock = clock
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._lines: list[bytes] = []
        self._segment = 0
        self._later: threading.Timer | None = None
        """Flushes what no later event would."""
        self._began_s = self._flushed_s = clock.monotonic_s()

    def write(self, event: str, **fields: Any) -> None:
        """Add one event; it reaches the store within about 5 s, later in a long run within 1% of its age
        (60 s at most, so that a month of events is not a million objects), or at `flush`."""
        line = {"at": self._clock.wall().isoformat(), "event": event, **fields}
        now_s = self._clock.monotonic_s()
        with self._lock:
            self._lines.append(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY))
            wait_s = self._flushed_s + self._every_s(now_s) - now_s
            if wait_s <= 0:
                self._flushed_s = now_s
            else:
                self._flush_later(wait_s)
        if wait_s <= 0:
            self.request_flush()

    def request_flush(self) -> None:
        """Have what is buffered written now, without waiting for it."""
        threading.Thread(target=self._flush_unless_flushing, name="events", daemon=True).start()

    def flush(self, timeout_s: float = FLUSHED_WITHIN_S) -> None:
        """Write what is buffered, waiting at most `timeout_s`. What a store doesn't take stays buffered."""
        thread = threading.Thread(target=self._flush_in_turn, name="events", daemon=True)
        thread.start()
        thread.join(timeout_s)

    def _every_s(self, now_s: float) -> float:
        return min(max(FLUSH_EVERY_S, (now_s - self._began_s) / 100), FLUSH_AT_LEAST_EVERY_S)

    def _flush_later(self, wait_s: float) -> None:
        """The last event before a silence must not wait for the silence to end. Called under the lock."""
        if self._later is None:
            self._later = threading.Timer(wait_s, self._flush_in_silence)
            self._later.name, self._later.daemon = "events", True
            self._later.start()

    def _flush_in_silence(self) -> None:
        self._flush_unless_flushing()
        with self._lock:
            self._later = None
            if self._lines:  # the store didn't take them, or a flush that was under way lacked them
                self._flush_later(self._every_s(self._clock.monotonic_s()))

    def _flush_in_turn(self) -> None:
        with self._flushing:  # what is being written may lack the last events
            self._flush()

    def _flush_unless_flushing(self) -> None:
        if self._flushing.acquire(blocking=False):  # otherwise the store is slow: the next one takes it along
            try:
                self._flush()
            finally:
                self._flushing.release()

    def _flush(self) -> None:
        with self._lock:
            lines = self._lines.copy()
        if not lines:
            return
        try:
            self._store.put(self._key.format(self._segment + 1), b"\n".join(lines) + b"\n")
        except StorageError:
            return
        self._segment += 1
        with self._lock:
            del self._lines[: len(lines)]


def read_segments(store: Store, prefix: str, seen: set[str] | None = None) -> Iterator[list[Event]]:
    """A run's events, segment by segment; each writer's in the order in which they happened.

    What can't be read of a segment gives one event `unreadable`, with its key and the number of lines.

    Args:
        seen: segments to pass over; those read are added, so a follower gets each event once.

    Raises:
        StorageError: the store can't be read.
    """
    seen = set() if seen is None else seen
    fresh = [key for key in store.keys(f"{prefix}/events") if key not in seen]
    with ThreadPoolExecutor(_SEGMENTS_AT_ONCE) as pool:
        for key, events in zip(fresh, pool.map(lambda key: _segment(store, key), fresh), strict=True):
            seen.add(key)
            yield events


def read_events(store: Store, prefix: str, seen: set[str] | None = None) -> Iterator[Event]:
    """As `read_segments`, as one stream in order of the events' time stamps."""
    events = [event for segment in read_segments(store, prefix, seen) for event in segment]
    yield from sorted(events, key=lambda event: str(event.get("at", "")))


def _segment(store: Store, key: str) -> list[Event]:
    try:
        lines = [line for line in store.get(key).splitlines() if line.strip()]
    except NotFound:
        return [{"event": "unreadable", "segment": key, "lines": None}]
    try:
        events = orjson.loads(b"[" + b",".join(lines) + b"]")  # much faster than line by line
    except orjson.JSONDecodeError:
        events = [_line(line) for line in lines]
    readable: list[Event] = [event for event in events if isinstance(event, dict)]
    if len(readable) < len(lines):
        at = readable[-1].get("at") if readable else None
        lost = len(lines) - len(readable)
        readable.append({**({"at": at} if at else {}), "event": "unreadable", "segment": key, "lines": lost})
    return readable


def _line(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
