"""Trials in the registry's log: begun, advanced, promoted, abandoned, and never by someone who is late."""

from __future__ import annotations

import pytest

from cluster import trials
from cluster.errors import BadInput, Conflict, NotFound
from cluster.names import ModelRef
from cluster.registry import Registry, Target
from cluster.storage import memory_store
from cluster.trial import Rules, Trial


@pytest.fixture
def registry() -> Registry:
    made = Registry(memory_store())
    for number in (1, 2, 3):
        made.register(
            "digits", manifest_key=f"m{number}", manifest=b"{}", run=f"run-{number}", metrics={}, why=""
        )
    made.promote("digits", "live", 1, why="")
    return made


def trial(registry: Registry) -> Trial | None:
    newest = registry.newest("digits")
    assert newest is not None
    return newest.aliases["live"].trial


def begin(registry: Registry, version: int = 2, steps: tuple[float, ...] = (1, 50)) -> Trial:
    trials.begin(registry, "digits", "live", version, mode="canary", steps=steps, why="")
    begun = trial(registry)
    assert begun is not None
    return begun


def test_a_canary_goes_its_steps_and_is_promoted(registry: Registry) -> None:
    first = begin(registry)
    assert (first.version, first.percent, first.began) == (2, 1, 5)
    assert registry.resolve(ModelRef("digits", "live")).version == 1
    newest = registry.newest("digits")
    assert newest is not None
    candidate = registry.candidate(newest, "live")
    assert candidate is not None
    assert candidate.run == "run-2"

    trials.advance(registry, "digits", "live", first, why="")
    second = trial(registry)
    assert second is not None
    assert (second.percent, second.began, second.stepped) == (50, 5, 6)
    assert second.is_last_step
    with pytest.raises(BadInput, match="last step"):
        trials.advance(registry, "digits", "live", second, why="")

    trials.promote(registry, "digits", "live", second, why="")
    assert trial(registry) is None
    assert registry.resolve(ModelRef("digits", "live")).version == 2
    registry.rollback("digits", "live", why="")
    assert registry.resolve(ModelRef("digits", "live")).version == 1


def test_whoever_is_late_is_refused(registry: Registry) -> None:
    first = begin(registry)
    trials.advance(registry, "digits", "live", first, why="")
    for late in (trials.advance, trials.promote):
        with pytest.raises(Conflict, match="another step"):
            late(registry, "digits", "live", first, why="")
    trials.abandon(registry, "digits", "live", first, why="bad")
    for late in (trials.advance, trials.promote, trials.abandon):
        with pytest.raises(Conflict, match="is over"):
            late(registry, "digits", "live", first, why="")
    again = begin(registry)
    assert again.began != first.began
    with pytest.raises(Conflict, match="is over"):
        trials.abandon(registry, "digits", "live", first, why="")
    assert trial(registry) == again


def test_moving_the_alias_ends_the_trial(registry: Registry) -> None:
    begin(registry)
    with pytest.raises(BadInput, match="is tried"):
        registry.rollback("digits", "live", why="")
    registry.promote("digits", "live", 3, why="")
    assert trial(registry) is None


def test_mistakes_are_explained(registry: Registry) -> None:
    with pytest.raises(NotFound, match="version 9"):
        begin(registry, version=9)
    with pytest.raises(BadInput, match="already"):
        begin(registry, version=1)
    for steps in ((), (50.0, 1.0), (0.0,), (101.0,)):
        with pytest.raises(BadInput, match="steps"):
            begin(registry, steps=steps)
    with pytest.raises(BadInput, match="no version is tried"):
        trials.abandon(registry, "digits", "live", why="")
    with pytest.raises(NotFound):
        trials.begin(registry, "no-such", "live", 1, mode="shadow", why="")
    with pytest.raises(NotFound, match="alias"):
        trials.begin(registry, "digits", "beta", 1, mode="shadow", why="")
    with pytest.raises(BadInput, match="hold_s"):
        trials.parse_rules({"hold_s": -1})
    with pytest.raises(BadInput, match="steps"):
        trials.parse_steps("1;2")
    assert trials.parse_rules({}) == Rules()


def test_entries_without_a_trial_read_as_ever(registry: Registry) -> None:
    newest = registry.newest("digits")
    assert newest is not None
    assert newest.aliases["live"] == Target(version=1, entry=4)
    assert "trial" not in newest.model_dump_json(exclude_none=True)
