"""Two kinds of replica: within bounds whatever is shown, enough for the load, cheap, quick from zero."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import Phase, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from serving.scaling.kinds import KindState, State, Terms, cheapest, decide
from serving.scaling.observed import Seen
from serving.scaling.policy import Settings
from serving.scaling.starts import Starts

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
    capacity_rows_s=st.none() | ANY,
)
PRICE = st.floats(0, 1e6)
TERMS = st.builds(
    lambda low, more, price: Terms(low, low + more, price), st.integers(0, 4), st.integers(1, 40), PRICE
)
SETTINGS = Settings(slo_s=1.0)
CPU, GPU = Terms(0, 100, 0.1), Terms(0, 10, 1.2)
CPU_S, GPU_S = 44.0, 800.0
COLD_S = (8.0, 40.0)


@examples(max_examples=60, deadline=None, phases=QUICK)
@given(
    looks=st.lists(st.tuples(SEEN, SEEN, st.integers(-10, 10**7), st.integers(-10, 10**7), ANY), max_size=12),
    terms=st.tuples(TERMS, TERMS),
)
def test_whatever_it_is_shown_it_stays_within_bounds(
    looks: list[tuple[Seen, Seen, int, int, float]], terms: tuple[Terms, Terms]
) -> None:
    state = State()
    for one, other, target, other_target, now_s in looks:
        decision = decide(SETTINGS, terms, state, (one, other), (target, other_target), now_s)
        state = decision.state
        for wanted, (least, most, _) in zip(decision.wanted, terms, strict=True):
            assert least <= wanted <= most


@examples(max_examples=100, deadline=None, phases=QUICK)
@given(
    rows_s=st.floats(0, 500),
    terms=st.tuples(TERMS, TERMS),
    capacities=st.tuples(st.floats(1, 100), st.floats(1, 100)),
)
def test_no_other_mix_that_is_enough_costs_less(
    rows_s: float, terms: tuple[Terms, Terms], capacities: tuple[float, float]
) -> None:
    def cost(mix: Sequence[int]) -> float:
        return sum(n * max(t.cost_per_hour, 1e-6) for n, t in zip(mix, terms, strict=True))

    def rows(mix: Sequence[int]) -> float:
        return sum(n * capacity for n, capacity in zip(mix, capacities, strict=True))

    floor = tuple(t.least for t in terms)
    found = cheapest(rows_s, terms, capacities, floor)
    every = itertools.product(*(range(t.least, t.most + 1) for t in terms))
    enough = [mix for mix in every if rows(mix) >= rows_s]
    if not enough:
        assert found == tuple(t.most for t in terms)
        return
    assert rows(found) >= rows_s * (1 - 1e-6) - 1e-6
    assert cost(found) <= min(map(cost, enough)) * (1 + 1e-4) + 1e-9


def run(
    rates: Sequence[float], terms: Sequence[Terms] = (CPU, GPU), state: State | None = None
) -> list[tuple[int, ...]]:
    """Decisions once a second; what is wanted is ready after its cold start."""
    state = state or State()
    wanted: list[tuple[int, ...]] = [tuple(t.least for t in terms)]
    for second, rows_s in enumerate(rates):
        ready = [
            min(then[kind] for then in wanted[-int(COLD_S[kind]) :])
            if second >= COLD_S[kind]
            else terms[kind].least
            for kind in range(2)
        ]
        seen = (
            Seen(ready=ready[0], arriving_rows_s=rows_s, capacity_rows_s=CPU_S),
            Seen(ready=ready[1], capacity_rows_s=GPU_S),
        )
        decision = decide(SETTINGS, terms, state, seen, wanted[-1], float(second))
        state = decision.state
        wanted.append(decision.wanted)
    return wanted


def test_cpus_do_the_base_and_gpus_come_for_the_peak_and_go_after_it() -> None:
    wanted = run([100.0] * 400 + [2000.0] * 300 + [100.0] * 1000)
    calm, peak, after = wanted[390], wanted[690], wanted[-1]
    assert calm[0] >= 3
    assert calm[1] == 0
    assert peak[1] >= 2
    assert peak[0] * CPU_S + peak[1] * GPU_S >= 2000
    assert after[1] == 0
    assert after[0] >= 3


def test_where_gpus_are_the_cheaper_they_do_the_base() -> None:
    wanted = run([700.0] * 900, (CPU, GPU._replace(cost_per_hour=0.4)))
    assert wanted[-1] == (0, 1)


def test_while_gpus_start_cpus_do_their_share() -> None:
    wanted = run([100.0] * 400 + [2000.0] * 60)
    soon = wanted[405]
    assert soon[1] >= 1
    assert soon[0] * CPU_S >= 1500


def test_the_base_is_not_given_up_for_a_peak() -> None:
    wanted = run([100.0] * 400 + [2000.0] * 120)
    assert min(n for n, _ in wanted[300:]) >= 3


def test_a_load_on_the_edge_does_not_go_back_and_forth() -> None:
    rates = [430.0 if second // 50 % 2 else 330.0 for second in range(2400)]
    changes = sum(a[1] != b[1] for a, b in itertools.pairwise(run(rates)[1200:]))
    assert changes <= 2


@pytest.mark.parametrize(("cpu_s", "gpu_s", "first"), [(5.0, 50.0, (1, 0)), (50.0, 5.0, (0, 1))])
def test_from_zero_it_is_the_kind_that_starts_faster(
    cpu_s: float, gpu_s: float, first: tuple[int, int]
) -> None:
    known = (
        KindState(CPU_S, starts=Starts(cold_start_s=cpu_s, seen=1)),
        KindState(GPU_S, starts=Starts(cold_start_s=gpu_s, seen=1)),
    )
    one = Seen(ready=0, waiting_rows=1)
    assert decide(SETTINGS, (CPU, GPU), State(kinds=known), (one, Seen(ready=0)), (0, 0), 5.0).wanted == first


def test_from_zero_with_more_than_one_fast_replica_can_do_the_price_decides() -> None:
    known = (KindState(CPU_S), KindState(GPU_S, starts=Starts(cold_start_s=60.0, seen=1)))
    many = Seen(ready=0, arriving_rows_s=700.0, waiting_rows=2000)
    wanted = decide(SETTINGS, (CPU, GPU), State(kinds=known), (many, Seen(ready=0)), (0, 0), 5.0).wanted
    assert wanted[1] >= 1
    assert wanted[0] > 1, "and they do what they can meanwhile"


def test_nothing_is_started_for_nobody_and_idle_ends_at_the_least() -> None:
    nobody = (Seen(ready=0), Seen(ready=0))
    assert decide(SETTINGS, (CPU, GPU), State(), nobody, (0, 0), 5.0).wanted == (0, 0)
    wanted = run([100.0] * 10 + [0.0] * 200, (replace_least(CPU, 1), GPU))
    assert wanted[-1] == (1, 0)


def test_a_kind_never_seen_is_tried_when_the_load_is_worth_its_price() -> None:
    state = State()
    busy = (Seen(ready=20, arriving_rows_s=900.0, capacity_rows_s=CPU_S), Seen(ready=0))
    for second in range(30):
        decision = decide(SETTINGS, (CPU, GPU), state, busy, (20, 0), float(second))
        state = decision.state
    assert decision.wanted[1] >= 1


def replace_least(terms: Terms, least: int) -> Terms:
    return terms._replace(least=least)


def test_the_slo_is_read_from_the_settings() -> None:
    strict = replace(SETTINGS, slo_s=0.05)
    seen = (Seen(ready=3, arriving_rows_s=100.0, capacity_rows_s=CPU_S), Seen(ready=0, capacity_rows_s=GPU_S))
    loose = decide(SETTINGS, (CPU, GPU), State(), seen, (3, 0), 0.0).wanted
    assert sum(decide(strict, (CPU, GPU), State(), seen, (3, 0), 0.0).wanted) >= sum(loose)
