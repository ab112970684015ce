"""A store's contract on the backends that need no server; the same on S3 is an integration test."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import NotFound, StorageError
from cluster.storage import Store, memory_store, open_store

STORES: dict[str, Callable[[Path], Store]] = {
    "memory": lambda folder: memory_store(),
    "directory": lambda folder: open_store(str(folder / "not yet there")),
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return STORES[request.param](tmp_path)


@pytest.mark.parametrize("size", [0, 1, 8 * 2**20 - 1, 8 * 2**20, 8 * 2**20 + 1, 50_000_000])
def test_any_size_comes_back_in_small_pieces(store: Store, size: int) -> None:
    data = os.urandom(1) * size
    store.put("key", data)
    pieces = list(store.chunks("key"))
    assert all(len(piece) <= 8 * 2**20 for piece in pieces)
    assert b"".join(pieces) == store.get("key") == data


def test_an_object_replaced_while_it_is_read_is_an_error(store: Store) -> None:
    store.put("key", b"a" * 60_000_000)
    pieces = store.chunks("key")
    next(pieces)
    store.put("key", b"b" * 60_000_000)
    with pytest.raises(StorageError):
        assert b"b" not in {piece[:1] for piece in pieces}


def test_reading_can_be_given_up(store: Store) -> None:
    store.put("key", b"a" * 60_000_000)
    pieces = store.chunks("key")
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    store.delete(["key"])
    with pytest.raises(NotFound):
        next(store.chunks("key"))


def test_the_first_to_create_wins(store: Store) -> None:
    assert store.put_if_absent("key", b"mine")
    assert not store.put_if_absent("key", b"theirs")
    assert store.put_if_absent("key", b"mine"), "our own bytes: the answer to the first try was lost"
    assert store.get("key") == b"mine"


@pytest.mark.parametrize("size", [0, 5, 3_000_000, 45_000_000])
def test_memory_is_written_from_where_it_lies(store: Store, size: int) -> None:
    memory = mmap.mmap(-1, size + 10)
    memory[7 : 7 + size] = os.urandom(1) * size
    store.put("key", memoryview(memory)[7 : 7 + size])
    assert store.get("key") == memory[7 : 7 + size]


def test_odd_names_are_written_and_read(store: Store) -> None:
    for key in ("a/c d/ü+%41", "a#b", "x{y}", "~t", "a?b", "n*"):
        store.put(key, b"1")
        assert store.put_if_absent(f"{key}.created", b"2")
        assert (store.get(key), store.get(f"{key}.created")) == (b"1", b"2")


def test_a_directory_has_it_on_disk_when_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    sync = os.fsync

    def spy(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        sync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    store = open_store(str(tmp_path / "store"))
    store.put("a/b/file", b"1")
    assert synced == [(tmp_path / "store" / place).stat().st_ino for place in ("a/b/file", "a/b", "a", "")]
    synced.clear()
    store.put_if_absent("a/entry", b"1")
    assert synced == [(tmp_path / "store" / place).stat().st_ino for place in ("a/entry", "a", "")]
