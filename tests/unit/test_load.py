"""The sliding window that scaling's figures come from."""

from hypothesis import given
from hypothesis import strategies as st

from serving.load import WINDOW_S, LoadWindow


def test_rates_are_of_the_last_seconds_only() -> None:
    window = LoadWindow(started_s=100.0)
    for tick in range(200):
        window.arrived(100 + tick * 0.1, rows=2)  # 10 requests a second for 20 s
    requests, rows, lost, busy = window.rates(120.0)
    assert 9.0 <= requests <= 11.0
    assert rows == 2 * requests
    assert (lost, busy) == (0, 0)
    assert window.rates(120.0 + 2 * WINDOW_S) == (0, 0, 0, 0)


def test_the_first_seconds_are_not_diluted() -> None:
    window = LoadWindow(started_s=0.25)
    for _ in range(20):
        window.arrived(1.2, rows=1)
    assert 18 <= window.rates(1.25)[0] <= 22


def test_a_batch_longer_than_a_bucket_is_counted_where_it_ran() -> None:
    window = LoadWindow(started_s=0.0)
    window.ran(4.0, duration_s=3.0)
    assert window.rates(4.0)[3] == 0.75
    assert window.rates(8.4)[3] < 0.4  # half of it has left the window


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 10)), max_size=50))
def test_one_slot_is_never_busier_than_all_the_time(steps: list[tuple[float, float]]) -> None:
    window, now_s = LoadWindow(started_s=10.0), 10.0
    for idle_s, busy_s in steps:
        now_s += idle_s + busy_s
        window.ran(now_s, busy_s)
        assert -1e-9 <= window.rates(now_s)[3] <= 1 + 1e-6
