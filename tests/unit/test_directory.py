"""Large objects written to a real directory from pages of memory, past the page cache."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from cluster.directory import WORTH_IT_BYTES, put_direct
from cluster.storage import open_store

SIZES = [WORTH_IT_BYTES, WORTH_IT_BYTES + 1, 4 * WORTH_IT_BYTES + 4095, 9 * WORTH_IT_BYTES]


def pages(size_bytes: int) -> memoryview:
    memory = mmap.mmap(-1, size_bytes)
    memory.write(os.urandom(size_bytes))
    return memoryview(memory)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of a file system that takes such writes."""
    if not put_direct(tmp_path, "probe", pages(WORTH_IT_BYTES)):
        pytest.skip("the file system of the tests' folder knows no O_DIRECT or O_TMPFILE")
    (tmp_path / "probe").unlink()
    return tmp_path


@pytest.mark.parametrize("size_bytes", SIZES)
def test_what_is_written_is_there_whole(folder: Path, size_bytes: int) -> None:
    data = pages(size_bytes)
    assert put_direct(folder, "a/b/key.bin", data)
    assert (folder / "a/b/key.bin").read_bytes() == data
    assert [path.name for path in (folder / "a/b").iterdir()] == ["key.bin"]


def test_what_was_there_is_replaced(folder: Path) -> None:
    for _ in range(2):
        data = pages(WORTH_IT_BYTES + 7)
        assert put_direct(folder, "key", data)
        assert (folder / "key").read_bytes() == data
    assert [path.name for path in folder.iterdir()] == ["key"]


def test_what_it_cannot_do_it_leaves_to_others(folder: Path) -> None:
    assert not put_direct(folder, "small", pages(WORTH_IT_BYTES - 1))
    assert not put_direct(folder, "odd memory", pages(WORTH_IT_BYTES))
    assert not put_direct(folder, "../outside", pages(WORTH_IT_BYTES))
    assert not put_direct(folder, "crooked", pages(2 * WORTH_IT_BYTES)[1:])
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("skew", [0, 1])
@pytest.mark.parametrize("key", ["plain", "with space/é%20"])
def test_a_store_takes_any_of_them(tmp_path: Path, skew: int, key: str) -> None:
    data = pages(2 * WORTH_IT_BYTES + 5)[skew:]
    store = open_store(str(tmp_path / "made on the way"))
    store.put(key, data)
    assert store.get(key) == data
    assert store.keys("") == [key]
