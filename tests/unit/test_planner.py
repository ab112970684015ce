"""The planner: whole requests by deadline, split ones, early drop, levels, lengths, cancellation."""

import math
import sys
import weakref

from hypothesis import given
from hypothesis import strategies as st

from serving.batching.latency import LatencyModel
from serving.batching.planner import MAX_WASTE, Planner
from serving.batching.ticket import HIGHEST, LOWEST, NORMAL, WEIGHTS, Plan, Ticket

FAR_S = 1e9


class Model:
    """A group whose batches take `batch_s` and `row_s` for each row; nothing is known where both are 0."""

    def __init__(self, batch_s: float = 0.0, row_s: float = 0.0) -> None:
        self.latency = LatencyModel()
        for _ in range(20 if batch_s + row_s else 0):
            for rows in (1, 8, 32):
                self.latency.observe(rows, 0, batch_s + row_s * rows)


SLOW = Model(0.05, 0.001)
UNKNOWN = Model()


def planner(max_batch_rows: int = 4, slo_s: float = 10.0) -> Planner:
    return Planner(max_batch_rows=max_batch_rows, slo_s=slo_s)


def added(planner: Planner, *tickets: Ticket) -> list[Ticket]:
    for ticket in tickets:
        planner.add(ticket)
    return list(tickets)


def tickets_of(plan: Plan) -> list[Ticket]:
    return [part.ticket for part in plan.batch]


def rows_of(plan: Plan) -> list[tuple[int, int]]:
    return [(part.start, part.stop) for part in plan.batch]


def test_an_idle_model_gets_a_single_request_at_once() -> None:
    p = planner()
    (ticket,) = added(p, Ticket(1, FAR_S, UNKNOWN))
    assert tickets_of(p.cut(0.0)) == [ticket]
    assert p.waiting_rows == len(p) == 0


def test_what_has_run_is_forgotten_though_nobody_asks_how_long_the_oldest_has_waited() -> None:
    class Payload:
        pass

    p = planner()
    seen = []
    for _ in range(10):
        payload = Payload()
        seen.append(weakref.ref(payload))
        p.add(Ticket(1, FAR_S, UNKNOWN, payload=payload))
        del payload
        p.cut(0.0)
    assert sum(one() is not None for one in seen) <= 1


def test_the_earliest_deadline_is_first_and_equal_ones_in_order() -> None:
    p = planner(max_batch_rows=2)
    late, soon, first, second = added(p, *(Ticket(1, at_s, UNKNOWN) for at_s in (9.0, 1.0, 5.0, 5.0)))
    assert tickets_of(p.cut(0.0)) == [soon, first]
    assert tickets_of(p.cut(0.0)) == [second, late]


def test_one_that_does_not_fit_is_passed_over_once_and_leads_the_next() -> None:
    p = planner(max_batch_rows=4)
    tickets = added(p, *(Ticket(rows, FAR_S, UNKNOWN) for rows in (2, 1, 2, 1)))
    assert tickets_of(p.cut(0.0)) == [tickets[0], tickets[1], tickets[3]]
    assert tickets_of(p.cut(0.0)) == [tickets[2]]


def test_a_request_larger_than_a_batch_is_cut_and_its_rest_shares() -> None:
    p = planner(max_batch_rows=4)
    added(p, Ticket(6, FAR_S, UNKNOWN), Ticket(2, FAR_S, UNKNOWN))
    assert rows_of(p.cut(0.0)) == [(0, 4)]
    assert rows_of(p.cut(0.0)) == [(4, 6), (0, 2)]
    assert p.waiting_rows == 0


def test_the_expired_and_the_cancelled_never_run() -> None:
    p = planner()
    late, gone, good = added(p, *(Ticket(1, at_s, UNKNOWN) for at_s in (5.0, FAR_S, FAR_S)))
    p.cancel(gone)
    p.cancel(gone)
    assert p.waiting_rows == 2
    plan = p.cut(6.0)
    assert (tickets_of(plan), plan.dropped) == ([good], [late])
    assert p.waiting_rows == 0


def test_a_split_request_that_is_cancelled_stops_there() -> None:
    p = planner(max_batch_rows=2)
    large, next_one = added(p, Ticket(5, FAR_S, UNKNOWN), Ticket(1, FAR_S, UNKNOWN))
    p.cut(0.0)
    p.cancel(large)
    assert p.waiting_rows == 1
    assert tickets_of(p.cut(0.0)) == [next_one]


def test_versions_and_shapes_dont_mix() -> None:
    p = planner()
    old, new = Model(), Model()
    for group, shape in ((old, 1), (old, 2), (old, 1), (new, 1)):
        p.add(Ticket(1, FAR_S, group, shape=shape))
    assert [(t.group, t.shape) for t in tickets_of(p.cut(0.0))] == [(old, 1), (old, 1)]
    assert len(p.cut(0.0).batch) == len(p.cut(0.0).batch) == 1


def test_expire_reaches_every_lane_and_level() -> None:
    p = planner()
    first, late, low = added(
        p,
        Ticket(1, FAR_S, UNKNOWN),
        Ticket(3, 1.0, UNKNOWN, shape="other"),
        Ticket(1, 1.5, UNKNOWN, level=LOWEST),
    )
    assert set(p.expire(2.0)) == {late, low}
    assert tickets_of(p.cut(2.0)) == [first]


def test_what_can_no_longer_make_it_is_dropped_before_it_expires() -> None:
    p = planner(max_batch_rows=32, slo_s=0.3)
    hopeless, good = added(p, Ticket(1, 0.04, SLOW), Ticket(1, 0.3, SLOW))
    plan = p.cut(0.0)
    assert (tickets_of(plan), plan.dropped) == ([good], [hopeless])


def test_a_batch_is_no_larger_than_its_tightest_deadline_allows() -> None:
    p = planner(max_batch_rows=32, slo_s=1.0)
    tight, *_ = added(p, Ticket(1, 0.07, SLOW), *(Ticket(1, 0.9, SLOW) for _ in range(31)))
    plan = p.cut(0.0)
    assert plan.batch[0].ticket is tight
    assert 5 < plan.rows < 20
    assert not plan.dropped
    assert SLOW.latency.safe_s(plan.rows) <= 0.07


def test_a_tight_head_is_given_up_where_its_small_batch_would_cost_more_of_the_others() -> None:
    p = planner(max_batch_rows=32, slo_s=0.3)
    added(p, Ticket(1, 0.056, SLOW), *(Ticket(1, 0.1, SLOW) for _ in range(32)))
    plan = p.cut(0.0)
    assert len(plan.dropped) == 1
    assert plan.rows == 32


def test_levels_share_by_their_weights_and_none_starves() -> None:
    p = planner(max_batch_rows=1)
    for level in (LOWEST, NORMAL, HIGHEST):
        added(p, *(Ticket(1, FAR_S, UNKNOWN, level=level) for _ in range(200)))
    served = [tickets_of(p.cut(0.0))[0].level for _ in range(105)]
    counts = {level: served.count(level) for level in WEIGHTS}
    assert all(abs(counts[level] - 5 * weight) <= 1 for level, weight in WEIGHTS.items())
    assert served[-21:].count(LOWEST) >= 1


def test_a_level_that_was_idle_has_saved_nothing_up() -> None:
    p = planner(max_batch_rows=1)
    for _ in range(1000):
        added(p, Ticket(1, FAR_S, UNKNOWN))
        p.cut(0.0)
    added(p, *(Ticket(1, FAR_S, UNKNOWN, level=level) for level in (LOWEST, NORMAL) for _ in range(30)))
    served = [tickets_of(p.cut(0.0))[0].level for _ in range(30)]
    assert 4 <= served.count(LOWEST) <= 8


@given(st.lists(st.integers(1, 4000), min_size=1, max_size=200))
def test_padding_stays_below_its_bound_and_everything_runs(lengths: list[int]) -> None:
    p = planner(max_batch_rows=16)
    for length in lengths:
        p.add(Ticket(1, FAR_S, UNKNOWN, length, octave=math.ceil(5 * math.log2(length))))
    ran = 0
    while len(p):
        plan = p.cut(0.0)
        own = sum(part.ticket.length for part in plan.batch)
        assert own >= (1 - MAX_WASTE) * plan.rows * plan.length
        ran += plan.rows
    assert ran == len(lengths)


def test_cutting_from_ten_thousand_takes_hardly_more_steps_than_from_a_hundred() -> None:
    def steps(waiting: int) -> int:
        p = planner(max_batch_rows=32, slo_s=1.0)
        for n in range(waiting):
            p.add(Ticket(1, 10 + n * 7919 % waiting / waiting, SLOW))
        count = 0

        def called(frame: object, event: str, argument: object) -> None:
            nonlocal count
            count += 1

        sys.setprofile(called)
        try:
            assert p.cut(0.0).rows == 32
        finally:
            sys.setprofile(None)
        return count

    assert steps(10_000) < 2 * steps(100)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 12), st.integers(0, 40), st.integers(0, 5)),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0), st.just(0)),
        st.tuples(st.just("cut"), st.integers(0, 3), st.just(0), st.just(0)),
        st.tuples(st.just("expire"), st.just(0), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(OPERATIONS, st.integers(1, 6), st.booleans())
def test_every_row_runs_once_in_order_or_never(operations, max_batch_rows: int, known: bool) -> None:
    p = planner(max_batch_rows)
    now_s = 0.0
    groups = [Model(0.5, 0.1), Model(0.5, 0.1)] if known else [Model(), Model()]
    accepted: list[Ticket] = []
    ran: list[tuple[Ticket, int]] = []
    dropped: set[Ticket] = set()

    def cut() -> None:
        plan = p.cut(now_s)
        assert plan.rows <= max_batch_rows
        assert len({id(part.ticket.group) for part in plan.batch}) <= 1
        dropped.update(plan.dropped)
        for part in plan.batch:
            assert part.ticket not in dropped
            assert part.ticket.deadline_s >= now_s
            assert part.rows == part.ticket.rows or part.ticket.rows > max_batch_rows
            ran.extend((part.ticket, row) for row in range(part.start, part.stop))

    for name, number, delay, kind in operations:
        if name == "add":
            ticket = Ticket(number, now_s + delay, groups[kind % 2], level=1 + kind // 2)
            p.add(ticket)
            accepted.append(ticket)
        elif name == "cancel" and number < len(accepted):
            p.cancel(accepted[number])
            dropped.add(accepted[number])
        elif name == "expire":
            dropped.update(p.expire(now_s))
        else:
            now_s += number
            cut()
        waiting = [t for t in accepted if not t.done]
        assert p.waiting_rows == sum(t.waiting_rows for t in waiting)
        assert len(p) == len(waiting)
    while len(p):
        cut()
    assert p.waiting_rows == 0
    for ticket in accepted:
        rows = [row for other, row in ran if other is ticket]
        assert rows == list(range(len(rows)))
        assert len(rows) == ticket.rows or ticket in dropped
