"""The latency model: it finds what is there, follows what changes, and never promises the impossible."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.batching.latency import MAX_MARGIN, LatencyModel


def taught(*batches: tuple[int, int, float]) -> LatencyModel:
    model = LatencyModel()
    for rows, length, duration_s in batches:
        model.observe(rows, length, duration_s)
    return model


def line(rows: int, length: int = 0, *, factor: float = 1.0) -> float:
    return factor * (0.05 + 0.001 * rows + 2e-6 * rows * length)


def test_it_knows_nothing_at_first_and_refuses_nothing() -> None:
    model = LatencyModel()
    assert not model.known
    assert (model.estimate_s(1000), model.safe_s(1000)) == (0, 0)
    assert model.rows_within(0.001, 0, 64) == 64


def test_two_sizes_measured_at_load_are_enough_for_those_between() -> None:
    model = taught((1, 0, line(1)), (32, 0, line(32)))
    for rows in (1, 8, 20, 32):
        assert model.estimate_s(rows) == pytest.approx(line(rows), rel=0.02)


def test_one_size_alone_is_taken_for_the_cost_of_a_batch() -> None:
    model = taught((1, 0, 0.05))
    assert model.estimate_s(1) == pytest.approx(0.05, rel=0.01)
    assert model.estimate_s(32) < 0.1


def test_rows_and_lengths_are_told_apart() -> None:
    rng = random.Random(1)
    batches = [(rng.randint(1, 32), rng.randint(1, 4000)) for _ in range(200)]
    model = taught(*((n, size, line(n, size) * rng.uniform(0.98, 1.02)) for n, size in batches))
    for found, true in zip(model.terms_s, (0.05, 0.001, 2e-6), strict=True):
        assert found == pytest.approx(true, rel=0.15)
    assert 0 < model.margin < 0.05


@pytest.mark.parametrize("factor", [0.4, 2.0, 5.0])
def test_it_follows_a_machine_that_changes_speed(factor: float) -> None:
    rng = random.Random(2)
    model = taught(*((n, 0, line(n)) for n in (rng.randint(1, 32) for _ in range(200))))
    for _ in range(4):
        rows = rng.randint(1, 32)
        model.observe(rows, 0, line(rows, factor=factor))
    for rows in (1, 16, 32):
        assert model.estimate_s(rows) == pytest.approx(line(rows, factor=factor), rel=0.15)
    for _ in range(300):
        rows = rng.randint(1, 32)
        model.observe(rows, 0, line(rows, factor=factor))
    assert model.estimate_s(16) == pytest.approx(line(16, factor=factor), rel=0.02)
    assert model.margin < 0.05


def test_a_single_slow_batch_moves_nothing() -> None:
    rng = random.Random(3)
    model = taught(
        *((n, 0, line(n) * rng.uniform(0.99, 1.01)) for n in (rng.randint(1, 32) for _ in range(99)))
    )
    before_s = model.estimate_s(16)
    model.observe(16, 0, 10.0)
    assert model.estimate_s(16) == pytest.approx(before_s, rel=0.02)


def test_what_is_not_seen_for_long_is_not_forgotten() -> None:
    model = taught(*((n, 0, line(n)) for n in (1, 8, 16, 32) * 10))
    for _ in range(5000):
        model.observe(32, 0, line(32))
    assert model.estimate_s(1) == pytest.approx(line(1), rel=0.05)


def test_the_margin_covers_the_spread() -> None:
    rng = random.Random(4)
    model = LatencyModel()
    over = 0
    for step in range(1000):
        rows = rng.randint(1, 32)
        took_s = line(rows) * rng.lognormvariate(0, 0.1)
        if step >= 200:
            over += took_s > model.safe_s(rows)
        model.observe(rows, 0, took_s)
    assert over / 800 < 0.12


BATCHES = st.lists(
    st.tuples(st.integers(1, 1000), st.integers(0, 10_000), st.floats(1e-6, 1e3)), min_size=1, max_size=120
)


@given(BATCHES, st.integers(1, 1000), st.integers(0, 10_000))
def test_nothing_is_ever_negative_and_more_never_takes_less(batches, rows: int, length: int) -> None:
    model = taught(*batches)
    assert all(term >= 0 for term in model.terms_s)
    assert 0 <= model.margin <= MAX_MARGIN
    estimate_s = model.estimate_s(rows, length)
    assert 0 <= estimate_s <= model.safe_s(rows, length)
    assert model.estimate_s(rows + 1, length) >= estimate_s
    assert model.estimate_s(rows, length + 1) >= estimate_s


@given(BATCHES, st.floats(1e-6, 100), st.integers(0, 10_000), st.integers(1, 512))
def test_rows_within_is_the_most_that_is_safe(batches, time_s: float, length: int, most: int) -> None:
    model = taught(*batches)
    rows = model.rows_within(time_s, length, most)
    assert 0 <= rows <= most
    assert rows == 0 or model.safe_s(rows, length) <= time_s * (1 + 1e-9)
    assert rows == most or model.safe_s(rows + 1, length) >= time_s * (1 - 1e-9)
    assert 1 <= model.working_rows(most, length, time_s) <= most
