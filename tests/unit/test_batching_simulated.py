"""The class test in simulated time: our rule beside others', as ratios of requests answered in time.

A device of 50 ms and 1 ms a row, at most 32 rows, so 390 rows/s; an SLO of 300 ms.
"""

import math
import random
from collections.abc import Callable

import pytest
from simulated_batching import (
    Arrival,
    Bento,
    Device,
    OnDemand,
    Ours,
    Outcome,
    Rule,
    ServeBatch,
    bursty,
    merged,
    poisson,
    simulate,
)

from serving.batching.planner import MAX_WASTE
from serving.batching.ticket import HIGHEST, LOWEST

SECONDS = 8.0
SLO_S = 0.3
CAPACITY = 32 / 0.082


def at(rate: float) -> list[Arrival]:
    return poisson(rate, SECONDS, lambda rng: SLO_S)


def mixed(rate: float = 500) -> list[Arrival]:
    return poisson(rate, SECONDS, lambda rng: rng.choice((0.2, 1.5)))


def goodput(rule: Rule, arrivals: list[Arrival]) -> float:
    return simulate(rule, arrivals).goodput


@pytest.mark.parametrize("rate", [60, 150])
def test_below_capacity_nobody_is_late_or_refused_and_serve_batch_collapses(rate: float) -> None:
    ours = simulate(Ours(SLO_S), at(rate))
    assert all(request.in_time for request in ours.arrivals)
    assert ours.goodput >= goodput(OnDemand(), at(rate))
    assert ours.goodput >= 0.99 * goodput(Bento(SLO_S), at(rate))
    assert ours.goodput >= 10 * goodput(ServeBatch(), at(rate))


def test_bursts() -> None:
    def burst() -> list[Arrival]:
        return bursty(300, SECONDS, SLO_S)

    ours = goodput(Ours(SLO_S), burst())
    assert ours >= 0.95 * goodput(Bento(SLO_S), burst())
    assert ours >= goodput(OnDemand(), burst())
    assert ours >= 3 * goodput(ServeBatch(), burst())


@pytest.mark.parametrize("rate", [500, 780, 2000])
def test_above_capacity_goodput_stays_at_its_peak_and_what_is_answered_is_in_time(rate: float) -> None:
    ours = simulate(Ours(SLO_S), at(rate))
    assert ours.goodput >= 0.95 * CAPACITY
    assert ours.goodput >= 0.98 * goodput(Bento(SLO_S), at(rate))
    assert ours.goodput >= 5 * goodput(OnDemand(), at(rate))
    assert ours.goodput >= 10 * goodput(ServeBatch(), at(rate))
    assert ours.late_share < 0.01


def test_mixed_deadlines() -> None:
    ours = simulate(Ours(1.5), mixed())
    best = max(goodput(Bento(limit_s), mixed()) for limit_s in (0.2, 0.3, 0.75, 1.5))
    assert ours.goodput >= 1.05 * best
    assert ours.goodput >= 1.5 * goodput(OnDemand(), mixed())
    assert ours.late_share < 0.01


def test_most_are_refused_at_the_door_rather_than_let_in_in_vain() -> None:
    rule = Ours(SLO_S)
    refused = sum(request.refused for request in simulate(rule, at(780)).arrivals)
    assert len(rule.dropped) < 0.1 * refused


def lengths(rate: float) -> list[Arrival]:
    rng, found = random.Random(5), poisson(rate, SECONDS, lambda rng: 1.0)
    for request in found:
        request.length = max(1, min(int(rng.lognormvariate(6.4, 1.1)), 4096))
    return found


def test_lengths() -> None:
    def device() -> Device:
        return Device(0.020, 0.0005, 4e-6)

    def best(rule: Callable[[], Rule]) -> float:
        return max(simulate(rule(), lengths(rate), device()).goodput for rate in (40, 60, 80, 120, 160))

    assert best(lambda: Ours(1.0)) >= 1.5 * best(OnDemand)
    for rate in (60, 160, 300):
        outcome = simulate(Ours(1.0), lengths(rate), device())
        assert outcome.waste < MAX_WASTE
        assert outcome.late_share < 0.02


def test_a_machine_that_becomes_three_times_as_slow_and_recovers() -> None:
    def slower(now_s: float) -> float:
        return 2.0 if 3.0 <= now_s < 6.0 else 1.0

    outcome = simulate(Ours(SLO_S), at(150), Device(slower=slower))

    def share(start_s: float, stop_s: float) -> float:
        inside = [request for request in outcome.arrivals if start_s <= request.at_s < stop_s]
        return sum(request.in_time for request in inside) / len(inside)

    assert share(0.0, 2.5) == 1.0
    assert share(3.5, 5.5) > 0.8
    assert share(7.0, SECONDS) == 1.0


def test_the_door_opens_again_after_a_hiccup_far_above_the_slo() -> None:
    def slower(now_s: float) -> float:
        return 20.0 if now_s < 1.0 else 1.0

    outcome = simulate(Ours(SLO_S), at(60), Device(slower=slower))
    late = [request for request in outcome.arrivals if request.at_s > 6.0]
    assert sum(request.in_time for request in late) > 0.95 * len(late)


def test_a_higher_level_is_kept_where_there_is_not_time_for_all_and_the_lowest_gets_a_share() -> None:
    def stream(level: int, rate: float, seed: int) -> list[Arrival]:
        found = poisson(rate, SECONDS, lambda rng: SLO_S, seed)
        for request in found:
            request.level = level
        return found

    arrivals = merged(stream(HIGHEST, 200, 1), stream(LOWEST, 600, 2))
    outcome: Outcome = simulate(Ours(SLO_S), arrivals)

    def kept(level: int) -> float:
        of_level = [request for request in outcome.arrivals if request.level == level]
        return sum(request.in_time for request in of_level) / len(of_level)

    assert kept(HIGHEST) > 0.9
    assert kept(LOWEST) > 1 / 21
    assert outcome.goodput > 0.85 * CAPACITY
    assert math.isclose(outcome.late_share, 0, abs_tol=0.02)
