"""`tandem runs pin` and `unpin` on a store in a folder."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cluster.cli import main
from cluster.pins import Pins
from cluster.runs import Run, RunRecord
from cluster.storage import open_store


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run with two checkpoints."""
    uri = str(tmp_path / "store")
    monkeypatch.setenv("TANDEM_STORE", uri)
    run = Run(open_store(uri), "r")
    created_at = datetime(2026, 1, 2, tzinfo=UTC)
    run.start(RunRecord(run="r", model="m", recipe={}, facts={}, created_at=created_at, release="0"))
    for number in (1, 2):
        run.checkpoints().commit(number, {"w": b"1"}, {"step": number})
    return run


def test_a_pin_is_set_and_removed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "pin", "r", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"run": "r", "pinned": [2]}
    assert Pins(run).all() == {2}
    assert main(["runs", "pin", "r", "2"]) == 0
    assert main(["runs", "unpin", "r", "2"]) == 0
    assert "none" in capsys.readouterr().out
    assert Pins(run).all() == set()


@pytest.mark.parametrize(
    "words", [["pin", "r", "3"], ["pin", "r", "0"], ["pin", "other", "1"], ["unpin", "other", "1"]]
)
def test_what_is_not_there_is_bad_input(
    run: Run, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["runs", *words]) == 2
    assert Pins(run).numbers() == set()
    assert "fix:" in capsys.readouterr().err
