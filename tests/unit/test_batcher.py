"""The planner: first in first out, whole requests, split ones, deadlines, cancellation, room."""

from hypothesis import given
from hypothesis import strategies as st

from serving.batcher import Batcher, Ticket

FAR_S = 1e9


def batcher(max_batch_size: int = 4, max_queue_rows: int = 100) -> Batcher:
    return Batcher(max_batch_size=max_batch_size, max_queue_rows=max_queue_rows)


def rows_of(plan) -> list[tuple[int, int]]:
    return [(part.start, part.stop) for part in plan.batch]


def test_an_idle_model_gets_a_single_request_at_once() -> None:
    b = batcher()
    ticket = Ticket(1, FAR_S)
    assert b.add(ticket)
    plan = b.cut(0.0)
    assert [part.ticket for part in plan.batch] == [ticket]
    assert b.waiting_rows == 0


def test_requests_that_gathered_leave_together_in_order_and_whole() -> None:
    b = batcher(max_batch_size=4)
    tickets = [Ticket(rows, FAR_S) for rows in (2, 1, 2, 1)]
    for ticket in tickets:
        b.add(ticket)
    assert [p.ticket for p in b.cut(0.0).batch] == tickets[:2]  # the third doesn't fit, and isn't overtaken
    assert [p.ticket for p in b.cut(0.0).batch] == tickets[2:]


def test_a_request_larger_than_a_batch_is_cut_and_its_rest_shares() -> None:
    b = batcher(max_batch_size=4)
    large, small = Ticket(6, FAR_S), Ticket(2, FAR_S)
    b.add(large)
    b.add(small)
    assert rows_of(b.cut(0.0)) == [(0, 4)]
    assert rows_of(b.cut(0.0)) == [(4, 6), (0, 2)]
    assert b.waiting_rows == 0


def test_a_large_request_never_fills_up_someone_elses_batch() -> None:
    b = batcher(max_batch_size=4)
    small, large = Ticket(1, FAR_S), Ticket(6, FAR_S)
    b.add(small)
    b.add(large)
    assert rows_of(b.cut(0.0)) == [(0, 1)]
    assert rows_of(b.cut(0.0)) == [(0, 4)]


def test_the_expired_and_the_cancelled_never_run() -> None:
    b = batcher()
    late, gone, good = Ticket(1, 5.0), Ticket(1, FAR_S), Ticket(1, FAR_S)
    for ticket in (late, gone, good):
        b.add(ticket)
    b.cancel(gone)
    b.cancel(gone)
    assert b.waiting_rows == 2
    plan = b.cut(6.0)
    assert [p.ticket for p in plan.batch] == [good]
    assert plan.expired == [late]
    assert b.waiting_rows == 0


def test_a_split_request_that_is_cancelled_stops_there() -> None:
    b = batcher(max_batch_size=2)
    large, next_one = Ticket(5, FAR_S), Ticket(1, FAR_S)
    b.add(large)
    b.add(next_one)
    b.cut(0.0)
    b.cancel(large)
    assert b.waiting_rows == 1
    assert [p.ticket for p in b.cut(0.0).batch] == [next_one]


def test_versions_dont_mix() -> None:
    b = batcher()
    old, new = object(), object()
    for group in (old, old, new):
        b.add(Ticket(1, FAR_S, group=group))
    assert [p.ticket.group for p in b.cut(0.0).batch] == [old, old]
    assert [p.ticket.group for p in b.cut(0.0).batch] == [new]


def test_a_full_queue_takes_no_more_until_a_batch_leaves() -> None:
    b = batcher(max_batch_size=4, max_queue_rows=5)
    assert b.add(Ticket(4, FAR_S))
    assert not b.add(Ticket(2, FAR_S))
    assert b.add(Ticket(1, FAR_S))
    b.cut(0.0)
    assert b.add(Ticket(4, FAR_S))


def test_expire_reaches_behind_the_head() -> None:
    b = batcher()
    first, late = Ticket(1, FAR_S), Ticket(3, 1.0)
    b.add(first)
    b.add(late)
    assert b.expire(2.0) == [late]
    assert b.waiting_rows == 1
    assert [p.ticket for p in b.cut(2.0).batch] == [first]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 12), st.integers(0, 40), st.integers(0, 1)),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0), st.just(0)),
        st.tuples(st.just("cut"), st.integers(0, 3), st.just(0), st.just(0)),
        st.tuples(st.just("expire"), st.just(0), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@given(OPERATIONS, st.integers(1, 6))
def test_every_row_runs_once_in_order_or_never(operations, max_batch_size: int) -> None:
    b = batcher(max_batch_size, max_queue_rows=30)
    now_s = 0.0
    groups = [object(), object()]
    accepted: list[Ticket] = []
    ran: list[tuple[Ticket, int]] = []
    dropped: set[Ticket] = set()

    def cut() -> None:
        plan = b.cut(now_s)
        assert plan.rows <= max_batch_size
        assert len({id(part.ticket.group) for part in plan.batch}) <= 1
        for part in plan.batch:
            assert part.ticket not in dropped
            whole = part.rows == part.ticket.rows
            assert whole or part.ticket.rows > max_batch_size
            ran.extend((part.ticket, row) for row in range(part.start, part.stop))
        dropped.update(plan.expired)
        assert all(ticket.deadline_s < now_s for ticket in plan.expired)

    for name, number, delay, group in operations:
        if name == "add":
            ticket = Ticket(number, now_s + delay, group=groups[group])
            room = 30 - b.waiting_rows
            assert b.add(ticket) == (number <= room)
            if number <= room:
                accepted.append(ticket)
        elif name == "cancel" and number < len(accepted):
            b.cancel(accepted[number])
            dropped.add(accepted[number])
        elif name == "expire":
            dropped.update(b.expire(now_s))
        else:
            now_s += number
            cut()
        assert 0 <= b.waiting_rows <= 30
    while len(b):
        cut()
    assert b.waiting_rows == 0
    order = [ticket for ticket, row in ran if row == 0]
    assert order == [ticket for ticket in accepted if ticket in set(order)]
    for ticket in accepted:
        rows = [row for other, row in ran if other is ticket]
        assert rows == list(range(len(rows)))
        assert len(rows) == ticket.rows or ticket in dropped
