"""Retries: by time, with growing pauses, and only of what may be gone the next time."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.retry import FIRST_PAUSE_S, LONGEST_PAUSE_S, retried


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 1000.0
        self.pauses_s: list[float] = []

    def wall(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC)

    def monotonic_s(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.pauses_s.append(duration_s)
        self.now_s += duration_s


class Flaky:
    """Fails until a moment; each attempt takes `takes_s`."""

    def __init__(self, clock: FakeClock, *, back_at_s: float, takes_s: float = 0.0) -> None:
        self.clock = clock
        self.back_at_s = back_at_s
        self.takes_s = takes_s
        self.attempts = 0

    def __call__(self) -> str:
        self.attempts += 1
        self.clock.now_s += self.takes_s
        if self.clock.now_s < self.back_at_s:
            raise ConnectionRefusedError("nobody is there")
        return "done"


def upper(low: float, high: float) -> float:
    assert low == high / 2
    return high


@pytest.mark.parametrize("outage_s", [0.0, 1.6, 60.0, 299.0, 599.0])
def test_an_outage_that_ends_in_time_is_ridden_out(outage_s: float) -> None:
    clock = FakeClock()
    call = Flaky(clock, back_at_s=clock.now_s + outage_s)
    assert retried(call, transient=lambda error: True, retry_s=600, clock=clock) == "done"
    assert clock.now_s - 1000 <= outage_s + LONGEST_PAUSE_S


def test_one_that_does_not_ends_in_its_own_error_at_the_deadline() -> None:
    clock = FakeClock()
    call = Flaky(clock, back_at_s=float("inf"), takes_s=3)
    with pytest.raises(ConnectionRefusedError):
        retried(call, transient=lambda error: True, retry_s=20, clock=clock)
    assert 20 <= clock.now_s - 1000 <= 20 + 3, "the last attempt begins by the deadline"


def test_what_is_not_transient_is_raised_at_once() -> None:
    clock = FakeClock()
    call = Flaky(clock, back_at_s=float("inf"))
    with pytest.raises(ConnectionRefusedError):
        retried(call, transient=lambda error: False, retry_s=600, clock=clock)
    assert (call.attempts, clock.pauses_s) == (1, [])


def test_without_time_to_retry_there_is_one_attempt() -> None:
    clock = FakeClock()
    call = Flaky(clock, back_at_s=float("inf"))
    with pytest.raises(ConnectionRefusedError):
        retried(call, transient=lambda error: True, retry_s=0, clock=clock)
    assert call.attempts == 1


def test_pauses_double_up_to_the_longest() -> None:
    clock = FakeClock()
    retried(
        Flaky(clock, back_at_s=1020),
        transient=lambda error: True,
        retry_s=60,
        clock=clock,
        uniform=upper,
    )
    assert clock.pauses_s[:7] == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0]
    assert max(clock.pauses_s) == LONGEST_PAUSE_S


@given(st.floats(0, 100), st.floats(0, 120), st.floats(0, 10))
def test_it_never_waits_past_the_deadline(retry_s: float, outage_s: float, takes_s: float) -> None:
    clock = FakeClock()
    call = Flaky(clock, back_at_s=clock.now_s + outage_s, takes_s=takes_s)
    try:
        retried(call, transient=lambda error: True, retry_s=retry_s, clock=clock)
    except ConnectionRefusedError:
        assert outage_s > retry_s
    assert clock.now_s - 1000 <= retry_s + takes_s + 1e-6
    assert all(pause >= FIRST_PAUSE_S / 2 for pause in clock.pauses_s[:-1])
