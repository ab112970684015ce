"""The alias follower: moves, failures, retries, stores that are away."""

import pytest

from cluster.errors import Damaged, NotFound, StorageError
from cluster.names import ModelRef
from cluster.registry import Registry, Version
from cluster.storage import memory_store
from serving.follow import FIRST_RETRY_S, Follower


class ManualClock:
    now_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s


class Fixture:
    def __init__(self, ref: str = "m@live") -> None:
        self.registry = Registry(memory_store())
        self.clock = ManualClock()
        self.broken: set[int] = set()
        self.swapped: list[int] = []
        self.failed: list[int | None] = []
        self.follower = Follower(
            self.registry,
            ModelRef.parse(ref),
            load=self.load,
            swap=self.swapped.append,
            failed=lambda version, error: self.failed.append(version.version if version else None),
            clock=self.clock,  # type: ignore[arg-type]
        )

    def load(self, version: Version) -> int:
        if version.version in self.broken:
            raise Damaged("broken")
        return version.version

    def register(self, promote: bool = True) -> int:
        version = self.registry.register("m", manifest_key="k", manifest=b"{}", run="r", metrics={}, why="t")
        if promote:
            self.registry.promote("m", "live", version.version, why="t")
        return version.version


def test_first_loads_what_the_alias_points_at() -> None:
    f = Fixture()
    with pytest.raises(NotFound, match="no model 'm'"):
        f.follower.first()
    f.register(promote=False)
    with pytest.raises(NotFound, match="no alias 'live'"):
        f.follower.first()
    f.registry.promote("m", "live", 1, why="t")
    assert f.follower.first() == 1


def test_it_follows_moves_of_its_alias_and_no_others() -> None:
    f = Fixture()
    f.register()
    f.follower.first()
    f.follower.poll()
    f.register(promote=False)
    f.registry.promote("m", "canary", 2, why="t")
    f.follower.poll()
    assert f.swapped == []
    f.registry.promote("m", "live", 2, why="t")
    f.follower.poll()
    f.registry.rollback("m", "live", why="t")
    f.follower.poll()
    assert f.swapped == [2, 1]
    assert f.failed == []


def test_a_broken_version_is_tried_again_after_a_wait_that_doubles() -> None:
    f = Fixture()
    f.register()
    f.follower.first()
    f.broken.add(2)
    f.register()
    for _ in range(5):
        f.follower.poll()
    assert (f.swapped, f.failed) == ([], [2])
    f.clock.now_s = FIRST_RETRY_S + 1
    f.follower.poll()
    f.clock.now_s += FIRST_RETRY_S + 1
    f.follower.poll()
    assert f.failed == [2, 2]
    f.clock.now_s += FIRST_RETRY_S
    f.broken.clear()
    f.follower.poll()
    assert f.swapped == [2]


def test_the_next_entry_ends_the_wait() -> None:
    f = Fixture()
    f.register()
    f.follower.first()
    f.broken.add(2)
    f.register()
    f.follower.poll()
    f.register()
    f.follower.poll()
    assert (f.swapped, f.failed) == ([3], [2])
    f.clock.now_s = 1e6
    f.follower.poll()
    assert f.failed == [2]


def test_a_store_that_is_away_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    f = Fixture()
    f.register()
    f.follower.first()
    f.register()

    def away(*_: object) -> None:
        raise StorageError("away")

    with monkeypatch.context() as patch:
        patch.setattr(f.registry, "newest", away)
        f.follower.poll()
    with monkeypatch.context() as patch:
        patch.setattr(f.registry, "version", away)
        f.follower.poll()
    assert f.failed == [None, None]
    f.follower.poll()
    assert f.swapped == [2]
