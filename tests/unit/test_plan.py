"""The order of samples: a permutation of each epoch, the same for any workers, and frozen."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.plan import BatchRange, Plan, rank_slice
from training.data.share import Share

GROUPS = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple)
PLANS = st.builds(
    Plan, st.integers(0, 2**63 - 1), st.text(max_size=8), GROUPS, st.integers(1, 5), st.booleans()
)


@given(PLANS, st.integers(0, 3))
def test_each_epoch_is_a_permutation(plan: Plan, epoch: int) -> None:
    ids = plan.row_ids(epoch, 0, plan.rows_per_epoch)
    assert ids.dtype == np.int64
    assert sorted(ids) == list(range(plan.rows_per_epoch))


@given(PLANS, st.integers(0, 3), st.data())
def test_any_range_is_that_part_of_the_whole(plan: Plan, epoch: int, data: st.DataObject) -> None:
    stop = data.draw(st.integers(0, plan.rows_per_epoch))
    start = data.draw(st.integers(0, stop))
    whole = plan.row_ids(epoch, 0, plan.rows_per_epoch)
    assert list(plan.row_ids(epoch, start, stop)) == list(whole[start:stop])


@settings(max_examples=60)
@given(PLANS, st.integers(1, 2), st.data())
def test_whatever_the_resizes_each_epoch_is_consumed_exactly_once(
    plan: Plan, epochs: int, data: st.DataObject
) -> None:
    seen: list[list[int]] = [[] for _ in range(epochs)]
    cursor = 0
    while cursor < epochs * plan.rows_per_epoch:
        world = data.draw(st.integers(1, 5))
        batch = plan.batch(cursor, data.draw(st.integers(1, 50)))
        slices = [rank_slice(batch.start, batch.stop, rank, world) for rank in range(world)]
        sizes = [stop - start for start, stop in slices]
        assert max(sizes) - min(sizes) <= 1
        for start, stop in slices:
            seen[batch.epoch] += plan.row_ids(batch.epoch, start, stop).tolist()
        cursor += batch.rows
    for epoch, ids in enumerate(seen):
        assert ids == plan.row_ids(epoch, 0, plan.rows_per_epoch).tolist()


def test_the_tail_is_neither_dropped_nor_padded() -> None:
    plan = Plan(0, "f", (7, 3))
    assert plan.steps_per_epoch(4) == 3
    assert [plan.batch(cursor, 4) for cursor in (0, 4, 8, 10, 18)] == [
        BatchRange(0, 0, 4),
        BatchRange(0, 4, 8),
        BatchRange(0, 8, 10),
        BatchRange(1, 0, 4),
        BatchRange(1, 8, 10),
    ]
    assert [plan.position(cursor, 4) for cursor in (0, 4, 8, 10, 14)] == [0, 1, 2, 3, 4]


def test_seed_epoch_and_fingerprint_each_change_the_order() -> None:
    groups = (50,) * 10
    orders = [
        tuple(plan.row_ids(epoch, 0, 500).tolist())
        for plan, epoch in [
            (Plan(0, "a", groups), 0),
            (Plan(0, "a", groups), 1),
            (Plan(1, "a", groups), 0),
            (Plan(0, "b", groups), 0),
        ]
    ]
    assert len(set(orders)) == len(orders)
    assert orders[0] == tuple(Plan(0, "a", groups).row_ids(0, 0, 500).tolist())


def test_without_shuffling_the_order_is_the_datasets_own() -> None:
    assert Plan(5, "f", (3, 4, 5), 2, shuffle=False).row_ids(2, 1, 11).tolist() == list(range(1, 11))


def test_a_step_touches_no_more_groups_than_a_window_and_a_rank_reads_each_group_once() -> None:
    plan = Plan(3, "f", (100,) * 64, window_groups=8)
    for start in range(0, 800, 32):
        assert len(set(plan.row_ids(0, start, start + 32) // 100)) <= 8
    windows = [set(plan.window_row_ids(0, w) // 100) for w in range(8)]
    assert sum(len(groups) for groups in windows) == 64
    assert set.union(*windows) == set(range(64))


def test_a_window_is_well_mixed() -> None:
    ids = Plan(11, "f", (1000,) * 8).row_ids(0, 0, 8000)
    # Of 1,000 rows, the count from one group of eight has mean 125 and deviation about 10.
    counts = [np.bincount(ids[i : i + 1000] // 1000, minlength=8) for i in range(0, 8000, 1000)]
    assert np.abs(np.asarray(counts) - 125).max() < 60
    assert abs(np.corrcoef(np.arange(8000), ids)[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("seed", "epoch", "expected"),
    [
        (0, 0, "ad1b585a1f9f56ba"),
        (1, 7, "44b3024b739da747"),
    ],
)
def test_the_order_is_frozen(seed: int, epoch: int, expected: str) -> None:
    """A run begun by an older release resumes in the order it began with: these may never change."""
    plan = Plan(seed, "fingerprint", (1000, 1, 37, 500, 2000), window_groups=2)
    ids = plan.row_ids(epoch, 0, plan.rows_per_epoch).astype("<i8")
    assert hashlib.sha256(ids.tobytes()).hexdigest()[:16] == expected


def test_the_first_rows_of_a_frozen_order() -> None:
    assert Plan(0, "fingerprint", (4, 4, 4), window_groups=2).row_ids(0, 0, 12).tolist() == [
        8,
        10,
        2,
        11,
        0,
        1,
        3,
        9,
        6,
        4,
        7,
        5,
    ]


@given(PLANS, st.integers(1, 40), st.integers(1, 5), st.data())
def test_windows_hold_exactly_the_positions_of_the_batches(
    plan: Plan, global_batch: int, world: int, data: st.DataObject
) -> None:
    cursor = data.draw(st.integers(0, 2 * plan.rows_per_epoch - 1))
    for rank in range(world):
        share = Share(plan, global_batch, rank, world, cursor)
        wanted: dict[int, set[int]] = {0: set(), 1: set()}
        at = cursor
        while at < 2 * plan.rows_per_epoch:
            batch = plan.batch(at, global_batch)
            positions, real = share.positions(batch)
            assert len(positions) == -(-batch.rows // world)
            assert positions[:real].tolist() == list(range(*rank_slice(batch.start, batch.stop, rank, world)))
            wanted[batch.epoch] |= set(positions.tolist())
            at += batch.rows
        for epoch, expected in wanted.items():
            if epoch < cursor // plan.rows_per_epoch:
                continue
            bounds = plan.window_bounds(epoch).tolist()
            held = [share.in_window(epoch, a, b).tolist() for a, b in pairwise(bounds)]
            assert sorted(expected) == [position for window in held for position in window]


@settings(max_examples=100)
@given(PLANS, st.integers(1, 5), st.integers(1, 50), st.data())
def test_a_window_holds_what_the_workers_batches_use(
    plan: Plan, world: int, global_batch: int, data: st.DataObject
) -> None:
    rows = plan.rows_per_epoch
    share = Share(
        plan, global_batch, data.draw(st.integers(0, world - 1)), world, data.draw(st.integers(0, 2 * rows))
    )
    epoch = share.cursor // rows + data.draw(st.integers(0, 1))
    low, high = sorted(data.draw(st.lists(st.integers(0, rows), min_size=2, max_size=2)))
    used: set[int] = set()
    cursor = max(share.cursor, epoch * rows)
    while cursor < (epoch + 1) * rows:
        batch = plan.batch(cursor, global_batch)
        used |= {int(position) for position in share.positions(batch)[0] if low <= position < high}
        cursor += batch.rows
    assert share.in_window(epoch, low, high).tolist() == sorted(used)
