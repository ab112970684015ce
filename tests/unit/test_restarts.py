"""Pauses between starts that fail."""

from __future__ import annotations

import random

import pytest

from training.crew.restarts import LONGEST_PAUSE_S, Restarts


def longest(_: float, most: float) -> float:
    return most


def test_pauses_double_up_to_a_limit() -> None:
    restarts = Restarts(1000, longest)
    assert [restarts.failed(0.0) for _ in range(7)] == [1, 2, 4, 8, 16, LONGEST_PAUSE_S, LONGEST_PAUSE_S]


def test_the_last_try_is_at_the_deadline_and_then_there_is_none() -> None:
    restarts = Restarts(10, longest)
    assert restarts.due(0)
    assert restarts.failed(0.0) == 1
    assert not restarts.due(0.9)
    assert restarts.due(1.0)
    assert restarts.failed(9.5) == 0.5
    assert restarts.failed(10.0) is None


def test_a_start_that_went_well_is_a_new_beginning() -> None:
    restarts = Restarts(10, longest)
    restarts.failed(0.0)
    restarts.failed(5.0)
    restarts.succeeded()
    assert restarts.due(5.0)
    assert restarts.failed(100.0) == 1


@pytest.mark.parametrize("seed", range(3))
def test_two_runs_never_pause_alike(seed: int) -> None:
    one, other = (Restarts(1000, random.Random(seed + n).uniform) for n in (0, 100))
    for _ in range(5):
        assert one.failed(0.0) != other.failed(0.0)
