"""Lengths of time as people say them, and how a running run is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import BadInput
from training.crew.lending import coordinator_name, named_so, seconds


@pytest.mark.parametrize(("text", "expected_s"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("2d", 172_800)])
def test_lengths_of_time(text: str, expected_s: float) -> None:
    assert seconds(text) == expected_s


@pytest.mark.parametrize("text", ["", "10", "-1s", "0s", "infh", "nans", "5 minutes"])
def test_what_is_no_length_of_time_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="not a length of time"):
        seconds(text)


def test_runs_of_one_name_in_two_stores_have_coordinators_of_their_own(tmp_path: Path) -> None:
    here, there = str(tmp_path / "here"), (tmp_path / "there").as_uri()
    names = [coordinator_name("a", here), coordinator_name("a", there), coordinator_name("a-b", here)]
    assert len(set(names)) == 3
    assert named_so(names, "a", None) == names[:2]
    assert named_so(names, "a", there) == names[1:2]
    assert named_so(names, "b", None) == []


def test_a_store_is_the_same_however_it_is_spelled(tmp_path: Path) -> None:
    spellings = [str(tmp_path), str(tmp_path) + "/", tmp_path.as_uri(), str(tmp_path / "x" / "..")]
    assert len({coordinator_name("a", store) for store in spellings}) == 1
    assert coordinator_name("a", "s3://b/p") == coordinator_name("a", "s3://b/p/")
