"""Events reach the store by themselves: the last one before a silence too, and after a store's failure."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import events
from cluster.errors import StorageError
from cluster.events import EventWriter, read_events
from cluster.storage import Store, open_store

PATIENCE_S = 10.0


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "FLUSH_EVERY_S", 0.05)


def stored(store: Store) -> list[str]:
    return [event["event"] for event in read_events(store, "runs/r")]


def await_true(true: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def test_an_event_that_none_follows_reaches_the_store(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    writer = EventWriter(store, "runs/r", "w")
    for name in ("first", "second", "third"):
        writer.write(name)
    await_true(lambda: stored(store) == ["first", "second", "third"])


def test_what_a_store_did_not_take_is_written_when_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    put, refused = store.put, []

    def fails_twice(key: str, data: Any) -> Any:
        if len(refused) < 2:
            refused.append(key)
            raise StorageError("the store is away", got="503", allowed="a store that answers", fix="wait")
        return put(key, data)

    monkeypatch.setattr(store, "put", fails_twice)
    EventWriter(store, "runs/r", "w").write("only")
    await_true(lambda: stored(store) == ["only"])
    assert len(refused) == 2
