"""A store's contract on the backends that need no server; the same on S3 is an integration test."""

from __future__ import annotations

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
