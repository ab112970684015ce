"""The pace of uploads, by a clock that is only a number."""

from __future__ import annotations

import math

import pytest

from training.checkpoints.calm import FEWEST, Calm
from training.checkpoints.throttle import (
    FIRST_MB_PER_S,
    HIGHEST_MB_PER_S,
    LOWEST_MB_PER_S,
    NOBODY_STEPS,
    Throttle,
)
from training.recipe import Checkpointing

MB = 1_000_000
PIECE = 32 * MB
LONG_S = 1e6


def uploaded_in_s(throttle: Throttle, size_bytes: int, within_s: float, limit: float | None = None) -> float:
    """Seconds until the last piece's turn has passed, where pieces themselves take no time."""
    now_s = 0.0
    throttle.begin(size_bytes, now_s=now_s, within_s=within_s, mb_per_s=limit)
    for at in range(0, size_bytes, PIECE):
        now_s = throttle.start_s(now_s)
        throttle.goes(min(PIECE, size_bytes - at), now_s)
    return throttle.start_s(now_s)


def steps_until_settled(feels_at_mb_per_s: float, steps: int = 600) -> list[float]:
    """The rates after each of many steps, which feel whatever is faster."""
    throttle = Throttle()
    rates = []
    for _ in range(steps):
        throttle.heard(1.5 if throttle.mb_per_s > feels_at_mb_per_s else 1.0)
        rates.append(throttle.mb_per_s)
    return rates


def test_before_any_step_is_heard_of_it_goes_at_the_first_rate() -> None:
    assert uploaded_in_s(Throttle(), 600 * MB, LONG_S) == pytest.approx(600 / FIRST_MB_PER_S)


def test_steps_that_feel_nothing_let_it_go_as_fast_as_it_can() -> None:
    assert steps_until_settled(math.inf)[3 * 7] == HIGHEST_MB_PER_S


def test_steps_that_always_feel_it_slow_it_down_to_the_lowest() -> None:
    assert steps_until_settled(0)[-1] == LOWEST_MB_PER_S


@pytest.mark.parametrize("bearable", [50.0, 100.0, 500.0])
def test_the_rate_stays_about_what_steps_can_bear(bearable: float) -> None:
    settled = steps_until_settled(bearable)[150:]
    assert max(settled) <= bearable + 10
    assert min(settled) >= 0.7 * bearable


def test_what_was_found_is_kept_for_the_next_upload() -> None:
    throttle = Throttle()
    for _ in range(9):
        throttle.heard(1.0)
    assert uploaded_in_s(throttle, 4800 * MB, LONG_S) == pytest.approx(10)


@pytest.mark.parametrize("size_bytes", [1, PIECE, 600 * MB, 36_000 * MB, 400_000 * MB])
@pytest.mark.parametrize("within_s", [5.0, 300.0])
def test_it_ends_in_time_whatever_steps_say(size_bytes: int, within_s: float) -> None:
    throttle = Throttle()
    for _ in range(50):
        throttle.heard(3.0)
    # The last piece begins in time, and a piece is held for no longer than the slowest rate says.
    assert (
        uploaded_in_s(throttle, size_bytes, within_s) <= within_s * (1 + 1e-6) + PIECE / MB / LOWEST_MB_PER_S
    )


def test_what_is_late_goes_at_once() -> None:
    throttle = Throttle()
    throttle.begin(600 * MB, now_s=0, within_s=10)
    assert not throttle.is_late(0)
    assert throttle.is_late(5)
    throttle.goes(PIECE, 20)
    assert throttle.start_s(20) < 20.1


def test_it_is_not_late_when_there_is_nothing_left() -> None:
    throttle = Throttle()
    throttle.begin(PIECE, now_s=0, within_s=1)
    throttle.goes(PIECE, 0)
    assert not throttle.is_late(100)


def test_where_nobody_steps_nothing_holds_it_until_somebody_does() -> None:
    throttle = Throttle()
    throttle.begin(600 * MB, now_s=0, within_s=LONG_S)
    throttle.goes(PIECE, 0)
    assert throttle.start_s(0) > 0
    throttle.heard(NOBODY_STEPS)
    assert throttle.start_s(0) == 0
    assert throttle.is_late(0)
    throttle.heard(1.0)
    assert throttle.start_s(0) > 0
    assert not throttle.is_late(0)


def test_the_next_upload_does_not_think_that_nobody_steps() -> None:
    throttle = Throttle()
    throttle.heard(NOBODY_STEPS)
    assert uploaded_in_s(throttle, 600 * MB, LONG_S) == pytest.approx(10)


def test_a_limit_holds_above_all() -> None:
    throttle = Throttle()
    throttle.heard(NOBODY_STEPS)
    assert uploaded_in_s(throttle, 600 * MB, within_s=1, limit=30) == pytest.approx(20)


def test_single_quick_steps_raise_nothing() -> None:
    throttle = Throttle()
    for _ in range(9):
        throttle.heard(1.0)
        throttle.heard(1.05)
    assert throttle.mb_per_s == FIRST_MB_PER_S


def test_a_step_is_compared_with_the_median_of_quiet_ones() -> None:
    calm = Calm(Checkpointing(), 0)
    assert calm.stepped(1, is_quiet=False) is None, "nothing to compare with"
    for step_s in [9.0, *[2.0] * FEWEST]:
        assert calm.stepped(step_s, is_quiet=True) is None
    assert calm.stepped(3, is_quiet=False) == 1.5
    assert calm.stepped(3, is_quiet=False) == 1.5, "a step during an upload is no quiet one"


@pytest.mark.parametrize(
    ("policy", "gaps_s", "calm_s"),
    [
        (Checkpointing(every_s=60, retry_s=600), [7, 7], [30, 30]),
        (Checkpointing(every_s=60, retry_s=20), [7, 7], [10, 10]),
        (Checkpointing(every_s="auto"), [7, 7], [30, 30]),
        (Checkpointing(every_s=None, every_steps=9, retry_s=600), [20, 8, 9000], [10, 4, 300]),
        (Checkpointing(every_s=60, every_steps=9, retry_s=600), [20, 8, 9000], [10, 4, 30]),
    ],
)
def test_an_upload_may_take_half_the_time_until_the_next(
    policy: Checkpointing, gaps_s: list[float], calm_s: list[float]
) -> None:
    calm, now_s, found = Calm(policy, 100), 100.0, []
    for gap_s in gaps_s:
        now_s += gap_s
        found.append(calm.saves(now_s))
    assert found == calm_s
