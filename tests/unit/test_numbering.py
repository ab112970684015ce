"""Rows of a dataset by number: every row is found in the one group that holds it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from training.data.numbering import Numbering, RowGroup


def laid(rows: list[int]) -> tuple[RowGroup, ...]:
    firsts = np.concatenate(([0], np.cumsum(rows)))
    return tuple(RowGroup(0, i, int(firsts[i]), count, 1) for i, count in enumerate(rows))


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.data())
def test_each_row_is_found_where_it_stands(rows: list[int], data: st.DataObject) -> None:
    groups = laid(rows)
    numbering = Numbering(groups)
    wanted = np.asarray(data.draw(st.lists(st.integers(0, sum(rows) - 1), max_size=40)), np.int64)
    found = numbering.by_group(wanted)
    assert [index for index, _ in found] == sorted({numbering.group_of(int(row)) for row in wanted})
    places = [place for _, part in found for place in part.tolist()]
    assert sorted(places) == list(range(len(wanted)))
    for index, part in found:
        first = groups[index].first_row
        assert ((wanted[part] >= first) & (wanted[part] < first + groups[index].rows)).all()
        assert (np.diff(part) > 0).all()
