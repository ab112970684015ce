"""The alias follower: moves, failures, retries, stores that are away."""

import pytest

from cluster import trials
from cluster.errors import Damaged, NotFound, StorageError
from cluster.names import ModelRef
from cluster.registry import Registry, Version
from cluster.storage import memory_store
from cluster.trial import Trial
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
        self.loads: list[int] = []
        self.tried: list[tuple[float | None, int | None, str | None]] = []
        self.follower = Follower(
            self.registry,
            ModelRef.parse(ref),
            load=self.load,
            swap=self.swapped.append,
            failed=lambda version, error: self.failed.append(version.version if version else None),
            tried=lambda trial, loaded, broken: self.tried.append(
                (trial.percent if trial else None, loaded, broken)
            ),
            clock=self.clock,  # type: ignore[arg-type]
        )

    def load(self, version: Version) -> int:
        self.loads.append(version.version)
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


def begin(f: Fixture, version: int) -> Trial:
    entry = trials.begin(f.registry, "m", "live", version, mode="canary", steps=(1, 50), why="t")
    trial = entry.aliases["live"].trial
    assert trial is not None
    return trial


def test_a_candidate_is_loaded_once_from_trial_to_promotion() -> None:
    f = Fixture()
    f.register()
    f.follower.first()
    f.register(promote=False)
    trial = begin(f, 2)
    f.follower.poll()
    trials.advance(f.registry, "m", "live", trial, why="t")
    f.follower.poll()
    f.follower.poll()
    f.registry.promote("m", "live", 2, why="t")
    f.follower.poll()
    assert f.tried == [(1, 2, None), (50, 2, None), (None, None, None)]
    assert f.swapped == [2]
    assert f.loads == [1, 2]


def test_a_replica_that_starts_during_a_trial_takes_part() -> None:
    f = Fixture()
    f.register()
    f.register(promote=False)
    begin(f, 2)
    assert f.follower.first() == 1
    f.follower.poll()
    assert f.tried == [(1, 2, None)]


def test_a_broken_candidate_is_reported_and_not_tried_again() -> None:
    f = Fixture()
    f.register()
    f.follower.first()
    f.broken.add(2)
    f.register(promote=False)
    begin(f, 2)
    for _ in range(3):
        f.follower.poll()
    assert f.tried == [(1, None, "broken")]
    assert f.loads == [1, 2]
    trials.abandon(f.registry, "m", "live", why="t")
    f.follower.poll()
    assert f.tried[-1] == (None, None, None)
    assert f.swapped == []


def test_a_store_that_is_away_is_no_fault_of_the_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    f = Fixture()
    f.register()
    f.follower.first()
    f.register(promote=False)
    begin(f, 2)

    def away(*_: object) -> None:
        raise StorageError("away")

    with monkeypatch.context() as patch:
        patch.setattr(f.follower, "_load", away)
        f.follower.poll()
    assert f.tried == []
    f.follower.poll()
    assert f.tried == [(1, 2, None)]
