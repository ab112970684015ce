"""The pure policy: never raises, stays within bounds, follows the load, learns cold starts and losses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import Phase, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from serving.load import Load
from serving.scaling.forecast import FORECASTS
from serving.scaling.observed import Seen, together
from serving.scaling.policy import Settings, State, decide
from serving.scaling.starts import UNKNOWN_S, Starts

QUICK = (Phase.explicit, Phase.generate)
"""No shrinking: an example of twenty looks is read as well as a smaller one."""
ANY = st.floats(allow_nan=True, allow_infinity=True)
SEEN = st.builds(
    Seen,
    ready=st.integers(-5, 10**6),
    starting=st.integers(-5, 10**6),
    arriving_rows_s=ANY,
    lost_rows_s=ANY,
    waiting_rows=ANY,
    oldest_waiting_s=ANY,
    busy_fraction=ANY,
    capacity_rows_s=st.none() | ANY,
    in_flight=ANY,
)
SETTINGS = Settings(least=1, most=100, slo_s=1.0)


def steady(
    settings: Settings, rows_s: float, seconds: int, state: State | None = None, at_s: float = 0.0
) -> tuple[State, int]:
    """Decisions once a second under a constant load; what is wanted is ready a second later."""
    state, target = state or State(), settings.least
    for second in range(seconds):
        seen = Seen(ready=target, arriving_rows_s=rows_s, capacity_rows_s=50.0)
        decision = decide(settings, state, seen, target, at_s + second)
        state, target = decision.state, decision.wanted
    return state, target


@examples(max_examples=60, deadline=None, phases=QUICK)
@given(
    looks=st.lists(st.tuples(SEEN, st.integers(-10, 10**7), ANY), max_size=20),
    least=st.integers(0, 5),
    more=st.integers(0, 50),
    forecast=st.sampled_from(sorted(FORECASTS)),
)
def test_whatever_it_is_shown_it_stays_within_bounds(
    looks: list[tuple[Seen, int, float]], least: int, more: int, forecast: str
) -> None:
    settings = Settings(least=least, most=least + more, forecast=forecast)
    state = State()
    for seen, target, now_s in looks:
        decision = decide(settings, state, seen, target, now_s)
        state = decision.state
        assert settings.least <= decision.wanted <= settings.most
        assert len(state.rates) <= settings.history_s


@examples(max_examples=60, deadline=None, phases=QUICK)
@given(
    rates=st.lists(st.floats(0, 1000), min_size=1, max_size=80),
    rows_s=st.floats(0, 1000),
    more_s=st.floats(0, 1000),
    waiting=st.floats(0, 1000),
    more_waiting=st.floats(0, 1000),
)
def test_more_load_never_wants_fewer(
    rates: list[float], rows_s: float, more_s: float, waiting: float, more_waiting: float
) -> None:
    state = State(rates=tuple(rates), rates_s=100.0, busy_s=100.0)
    seen = Seen(ready=2, arriving_rows_s=rows_s, waiting_rows=waiting, capacity_rows_s=20.0)
    busier = replace(seen, arriving_rows_s=rows_s + more_s, waiting_rows=waiting + more_waiting)
    few = decide(Settings(most=10_000), state, seen, 2, 100.5)
    many = decide(Settings(most=10_000), state, busier, 2, 100.5)
    assert many.wanted >= few.wanted
    assert many.need >= few.need


@examples(max_examples=60, deadline=None, phases=QUICK)
@given(capacity=st.floats(1, 1000), more=st.floats(0, 1000))
def test_a_faster_replica_never_needs_more_of_them(capacity: float, more: float) -> None:
    seen = Seen(ready=1, arriving_rows_s=200.0, waiting_rows=50.0, capacity_rows_s=capacity)
    slow = decide(Settings(most=10_000), State(), seen, 1, 0.0)
    fast = decide(Settings(most=10_000), State(), replace(seen, capacity_rows_s=capacity + more), 1, 0.0)
    assert fast.wanted <= slow.wanted


def test_a_steady_load_gets_what_it_needs_and_not_much_more() -> None:
    _, wanted = steady(SETTINGS, 200.0, 300)
    assert 200 / 50 < wanted <= 200 / 50 + 2


def test_a_burst_is_answered_at_once() -> None:
    state, calm = steady(SETTINGS, 20.0, 300)
    burst = Seen(ready=calm, arriving_rows_s=200.0, waiting_rows=400.0, capacity_rows_s=50.0)
    assert decide(SETTINGS, state, burst, calm, 300.0).wanted >= 4


def test_less_load_is_believed_only_after_a_while() -> None:
    state, busy = steady(SETTINGS, 300.0, 120)
    state, soon = steady(replace(SETTINGS, least=1), 20.0, 20, state, 120.0)
    assert soon >= 6
    _, late = steady(SETTINGS, 20.0, 600, state, 140.0)
    assert late == 1
    assert busy > late


def test_losses_teach_that_a_replica_is_good_for_less() -> None:
    state, few = steady(SETTINGS, 100.0, 120)
    lossy = Seen(ready=few, arriving_rows_s=100.0, lost_rows_s=30.0, capacity_rows_s=50.0)
    for second in range(120, 130):
        decision = decide(SETTINGS, state, lossy, few, float(second))
        state = decision.state
    assert decision.wanted > few
    assert state.share < 1.0


def test_zero_after_idling_and_back_for_the_first_request() -> None:
    settings = replace(SETTINGS, least=0, idle_s=60.0)
    state, target = State(), 1
    wanted = []
    for second in range(70):
        rows_s = 5.0 if second < 2 else 0.0
        seen = Seen(ready=target, arriving_rows_s=rows_s, capacity_rows_s=50.0)
        decision = decide(settings, state, seen, target, float(second))
        state, target = decision.state, decision.wanted
        wanted.append(target)
    assert wanted[50] == 1
    assert wanted[-1] == 0
    assert decide(settings, state, Seen(ready=0, waiting_rows=1), 0, 90.0).wanted == 1


def test_nothing_is_started_for_nobody() -> None:
    settings = replace(SETTINGS, least=0)
    assert decide(settings, State(), Seen(ready=0), 0, 5.0).wanted == 0


def test_a_cold_start_is_learned() -> None:
    starts = Starts().after(ready=1, target=3, now_s=0.0)
    assert starts.cold_start_s == UNKNOWN_S
    starts = starts.after(ready=2, target=3, now_s=4.0).after(ready=3, target=3, now_s=4.0)
    assert starts.cold_start_s == pytest.approx(4.0)
    assert not starts.pending
    gone = starts.after(ready=3, target=5, now_s=5.0).after(ready=3, target=3, now_s=6.0)
    assert not gone.pending


def test_a_start_that_someone_else_asked_for_is_learned_too() -> None:
    state = State().asked_for_at(10.0)
    decision = decide(SETTINGS, state, Seen(ready=1, arriving_rows_s=1.0), 1, 13.0)
    assert decision.state.starts.cold_start_s == pytest.approx(3.0)


@pytest.mark.parametrize("name", sorted(FORECASTS))
def test_no_forecast_is_below_a_steady_load(name: str) -> None:
    assert FORECASTS[name]([7.0] * 300, 10.0, 0.95) == pytest.approx(7.0)


def test_rises_are_learned_from_the_past() -> None:
    sawtooth = [10.0, 10.0, 10.0, 10.0, 10.0, 30.0, 30.0, 30.0, 30.0, 30.0] * 30
    assert FORECASTS["rises"](sawtooth[:-5], 5.0, 0.95) > 15.0


def test_loads_of_replicas_become_one() -> None:
    load = Load(
        waiting_requests=3,
        oldest_waiting_s=0.5,
        busy_fraction=0.5,
        capacity_rows_per_s=40.0,
        arrivals_per_s=10.0,
        arriving_rows_per_s=20.0,
        lost_per_s=1.0,
    )
    broken = replace(load, capacity_rows_per_s=None, arriving_rows_per_s=math.nan, arrivals_per_s=0.0)
    seen = together([load, broken], ready=2, starting=1, held=2.0)
    assert (seen.ready, seen.starting) == (2, 1)
    assert seen.arriving_rows_s == 20.0
    assert seen.capacity_rows_s == 40.0
    assert seen.waiting_rows == pytest.approx((3 + 3 + 2) * 2)
    assert seen.lost_rows_s == pytest.approx(4.0)
