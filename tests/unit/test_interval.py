"""The interval between saves: near the optimum, and within its bounds whatever was measured."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.checkpoints.interval import FIRST_S, LONGEST_S, SHORTEST_S, AutoInterval, next_save_s

DAY_S = 86_400.0
seconds = st.floats(0, 10_000)


def lost_share(interval_s: float, cost_s: float, between_failures_s: float) -> float:
    """The share of time that saves and lost work cost: exact for failures at random (Daly, equation 20)."""
    return (
        math.exp(cost_s / between_failures_s)
        * (math.expm1(interval_s / between_failures_s) * between_failures_s / (interval_s - cost_s))
        - 1
    )


@pytest.mark.parametrize(("cost_s", "failures_a_day"), [(0.05, 1), (0.5, 10), (2.0, 4), (0.02, 200)])
def test_it_is_near_the_interval_that_loses_least(cost_s: float, failures_a_day: int) -> None:
    watched_s = 100 * DAY_S
    got_s = next_save_s(
        blocking_s=cost_s, upload_s=0, failures=100 * failures_a_day, watched_s=watched_s, longest_s=1e6
    )
    between_s = DAY_S / failures_a_day
    best = min(lost_share(cost_s + n / 4, cost_s, between_s) for n in range(1, 40_000))
    assert lost_share(got_s, cost_s, between_s) <= best * 1.02 or got_s == pytest.approx(100 * cost_s)


@given(seconds, seconds, st.integers(0, 10_000), st.floats(0, 1e8))
def test_saves_cost_at_most_a_hundredth_and_never_overlap(
    blocking_s: float, upload_s: float, failures: int, watched_s: float
) -> None:
    got_s = next_save_s(blocking_s=blocking_s, upload_s=upload_s, failures=failures, watched_s=watched_s)
    assert blocking_s / got_s <= 0.01 + 1e-12
    assert got_s > blocking_s + upload_s or blocking_s + upload_s == 0
    assert got_s >= SHORTEST_S
    assert got_s <= max(LONGEST_S, 100 * blocking_s, 1.25 * (blocking_s + upload_s) + 1e-9)


@given(st.floats(0.001, 10), st.integers(0, 100), st.floats(0, 1e7))
def test_more_failures_never_make_it_longer(blocking_s: float, failures: int, watched_s: float) -> None:
    fewer, more = (
        next_save_s(blocking_s=blocking_s, upload_s=0, failures=n, watched_s=watched_s)
        for n in (failures, failures + 1)
    )
    assert more <= fewer


def test_before_anything_was_measured_it_is_a_minute() -> None:
    assert AutoInterval().next_s(0) == FIRST_S


def test_the_slowest_of_the_recent_saves_counts() -> None:
    auto = AutoInterval()
    auto.saved(0.01, 40.0)
    auto.saved(0.01, 1.0)
    assert auto.next_s(100) >= 40 / 0.8
    for _ in range(5):
        auto.saved(0.01, 1.0)
    assert auto.next_s(100) < 50


def test_failures_seen_before_shorten_it() -> None:
    calm, troubled = AutoInterval(0, DAY_S), AutoInterval(30, DAY_S)
    for auto in (calm, troubled):
        auto.saved(0.05, 2.0)
    assert troubled.next_s(0) < calm.next_s(0) / 3
