"""A store that fails again and again is told of now and then."""

from __future__ import annotations

from datetime import UTC, datetime

from cluster.errors import StorageError
from cluster.events import EventWriter, read_events
from cluster.storage import memory_store
from training.telling import TROUBLES_EVERY_S, Troubles


class Clock:
    """Stands still until it is set."""

    now_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s

    def wall(self) -> datetime:
        return datetime(2026, 1, 2, tzinfo=UTC)

    def sleep(self, duration_s: float) -> None:
        raise NotImplementedError


def test_troubles_of_one_minute_are_one_event() -> None:
    store, clock = memory_store(), Clock()
    events = EventWriter(store, "runs/r", "w", clock)
    troubles = Troubles(events, clock)
    for second in range(150):
        clock.now_s = float(second)
        troubles.tell(StorageError("the store answers with an error", got=f"503 at {second} s"))
    events.flush()
    told = [(e["event"], e["got"]) for e in read_events(store, "runs/r")]
    every = int(TROUBLES_EVERY_S)
    assert told == [("checkpoint-delayed", f"503 at {n} s") for n in range(0, 150, every)]
