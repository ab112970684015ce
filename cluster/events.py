"""What happens in a run, as JSON lines in the store: steps, checkpoints, failures, results.

Object stores can't append, so a writer buffers and writes numbered segments under a name of its
own (`events/ATTEMPT-00001.jsonl`). Losing the last few seconds of events at a crash loses no data:
nothing is decided from events.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import orjson

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import StorageError
from cluster.storage import Store

FLUSH_EVERY_S = 5.0


class EventWriter:
    """Writes events of one attempt. `writer` must be unique to the process, e.g. `TIME-rank0`."""

    def __init__(self, store: Store, prefix: str, writer: str, clock: Clock = SYSTEM_CLOCK) -> None:
        self._store = store
        self._key = f"{prefix}/events/{writer}-{{:05d}}.jsonl"
        self._clock = clock
        self._lock = threading.Lock()
        self._lines: list[bytes] = []
        self._segment = 0
        self._flushed_s = clock.monotonic_s()

    def write(self, event: str, **fields: Any) -> None:
        """Add one event; it reaches the store within about 5 s, or at `flush`."""
        line = {"at": self._clock.wall().isoformat(), "event": event, **fields}
        with self._lock:
            self._lines.append(orjson.dumps(line, option=orjson.OPT_SERIALIZE_NUMPY))
            due = self._clock.monotonic_s() - self._flushed_s >= FLUSH_EVERY_S
        if due:
            self.flush()

    def flush(self) -> None:
        """Write what is buffered. A store that fails keeps it buffered; the run goes on."""
        with self._lock:
            self._flushed_s = self._clock.monotonic_s()
            if not self._lines:
                return
            try:
                self._store.put(self._key.format(self._segment + 1), b"\n".join(self._lines) + b"\n")
            except StorageError:
                return
            self._segment += 1
            self._lines = []


def read_events(store: Store, prefix: str, seen: set[str] | None = None) -> Iterator[dict[str, Any]]:
    """All events of a run, in order of their time stamps.

    Args:
        seen: segments to pass over; those read are added, so a follower gets each event once.
    """
    seen = set() if seen is None else seen
    fresh = [key for key in store.keys(f"{prefix}/events") if key not in seen]
    events = [orjson.loads(line) for key in fresh for line in store.get(key).splitlines() if line]
    seen.update(fresh)
    yield from sorted(events, key=lambda event: str(event.get("at", "")))
