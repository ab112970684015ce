"""A log of checkpoints of which an entry in the middle is gone, as when somebody made room by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.artifacts import Artifacts
from cluster.errors import Conflict
from cluster.manifest import Manifest, Writer
from cluster.storage import Store, memory_store, open_store

OLD, NEW = Writer(epoch=1, generation=0), Writer(epoch=2, generation=0)


@pytest.fixture(params=["memory", "directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return memory_store() if request.param == "memory" else open_store(str(tmp_path))


def with_a_hole(store: Store, entries: int, hole: int) -> Artifacts:
    """A log of `entries`, of which the folder of one was deleted."""
    artifacts = Artifacts(store, "runs/r/checkpoints", "checkpoint")
    for number in range(1, entries + 1):
        artifacts.publish(number, f"n{number}", {}, {}, OLD)
    store.delete(store.keys(artifacts.key(hole).rpartition("/")[0]))
    return artifacts


@pytest.mark.parametrize("hole", range(1, 9))
def test_what_stands_behind_a_hole_is_found(store: Store, hole: int) -> None:
    artifacts = with_a_hole(store, 9, hole)
    assert artifacts.head() == 9
    last = artifacts.last()
    assert last is not None
    assert last.number == 9


def test_folders_that_nothing_was_committed_in_are_no_entries(store: Store) -> None:
    artifacts = with_a_hole(store, 5, 3)
    store.put(f"{artifacts.folder(6, 'killed')}/a", b"half a checkpoint")
    store.put(f"{artifacts.folder(11, 'odd')}/a", b"nobody's")
    assert artifacts.head() == 5


def test_a_fence_stands_behind_all_that_an_older_writer_knows(store: Store) -> None:
    """In the hole it would fence nobody off: the old writer is past it, and goes on from the newest."""
    artifacts = with_a_hole(store, 9, 7)
    assert artifacts.fence(NEW).number == 10
    with pytest.raises(Conflict):
        artifacts.publish(10, "late", {}, {}, OLD)


def test_falling_back_goes_past_a_hole_and_says_so(store: Store) -> None:
    artifacts = with_a_hole(store, 9, 8)
    store.put(artifacts.key(9), b"damaged")
    told: list[int] = []

    def load(manifest: Manifest) -> int:
        return manifest.number

    found = artifacts.newest(load, lambda number, _: told.append(number))
    assert found is not None
    assert (found[1], told) == (7, [9, 8])
