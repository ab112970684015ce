"""The audit: a whole ledger passes; a row lost or taken twice is found and named."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.cli import main
from cluster.errors import Damaged, NotFound
from cluster.runs import Run, RunRecord
from cluster.storage import open_store
from training.data.audit import Segment, audit, audit_epochs, ledger_problems
from training.data.dataset import Dataset

ROWS = 100
SEED = 5


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    folder = tmp_path / "data"
    folder.mkdir()
    table = pa.table({"x": np.arange(ROWS, dtype=np.float32), "y": np.arange(ROWS, dtype=np.float32)})
    pq.write_table(table.slice(0, 70), folder / "a.parquet", row_group_size=20)
    pq.write_table(table.slice(70), folder / "b.parquet", row_group_size=20)
    return Dataset.open(str(folder))


def run_with(dataset: Dataset, tmp_path: Path, *ranges: tuple, cursor: int | None = None, **meta: Any) -> Run:
    run = Run(open_store(str(tmp_path / "store")), "audited")
    recipe = {
        "model": "line",
        "task": "recording_task:RecordingTask",
        "data": {"train": dataset.uri, "eval": dataset.uri, "label": "y"},
        "store": run.store.uri,
        "optimization": {"seed": SEED, "epochs": 3, "global_batch_size": 10},
    }
    run.start(
        RunRecord(
            run="audited",
            model="line",
            recipe=recipe,
            facts={},
            created_at=datetime(2026, 1, 1, tzinfo=UTC),
            release="0",
        )
    )
    ledger = [
        {"start": r[0], "stop": r[1], "attempt": r[2], "workers": 1, "skipped": len(r) > 3} for r in ranges
    ]
    whole = {
        "step": 1,
        "cursor": ranges[-1][1] if cursor is None else cursor,
        "fingerprint": dataset.fingerprint,
        "ledger": ledger,
    }
    checkpoints = run.checkpoints()
    checkpoints.commit(checkpoints.head() + 1, {"weights": b"w"}, whole | meta)
    return run


def named(rows: tuple) -> set[int]:
    """Dataset rows of what was named."""
    starts = {("a.parquet", 0): 0, ("a.parquet", 1): 20, ("a.parquet", 2): 40, ("a.parquet", 3): 60}
    starts |= {("b.parquet", 0): 70, ("b.parquet", 1): 90}
    return {starts[row.file, row.group] + row.row for row in rows}


def test_a_whole_ledger_passes(dataset: Dataset, tmp_path: Path) -> None:
    found = audit(run_with(dataset, tmp_path, (0, 30, "a"), (30, 120, "b"), (120, 250, "b")))
    assert found.problems == ()
    assert [(e.due_rows, e.missing_rows, e.repeated_rows) for e in found.epochs] == [
        (100, 0, 0),
        (100, 0, 0),
        (50, 0, 0),
    ]
    assert (found.segments, found.attempts, found.cursor) == (3, 2, 250)


def test_missing_and_repeated_rows_are_named(dataset: Dataset, tmp_path: Path) -> None:
    found = audit(run_with(dataset, tmp_path, (0, 30, "a"), (35, 120, "b"), (110, 150, "c")))
    plan = dataset.plan(SEED)
    assert [(e.missing_rows, e.repeated_rows) for e in found.epochs] == [(5, 0), (0, 10)]
    assert named(found.epochs[0].missing) == set(plan.row_ids(0, 30, 35).tolist())
    assert named(found.epochs[1].repeated) == set(plan.row_ids(1, 10, 20).tolist())
    assert {row.times for row in found.epochs[0].missing} == {0}
    assert {row.times for row in found.epochs[1].repeated} == {2}
    assert len(found.problems) == 4  # two breaks in the line, and what they did to two epochs


def test_what_was_skipped_is_told_and_no_problem(dataset: Dataset, tmp_path: Path) -> None:
    found = audit(run_with(dataset, tmp_path, (0, 90, "a"), (90, 110, "a", "skipped"), (110, 120, "a")))
    assert found.problems == ()
    assert [(s.epoch, s.position, s.rows) for s in found.skipped] == [(0, 90, 10), (1, 0, 10)]
    assert named(found.skipped[1].names) == set(dataset.plan(SEED).row_ids(1, 0, 10).tolist())


def test_a_cursor_ahead_of_the_ledger_means_missing_rows(dataset: Dataset, tmp_path: Path) -> None:
    found = audit(run_with(dataset, tmp_path, (0, 90, "a"), cursor=100))
    assert found.epochs[0].missing_rows == 10
    behind = audit(run_with(dataset, tmp_path, (0, 90, "a"), cursor=80))
    assert (behind.epochs[0].missing_rows, behind.epochs[0].repeated_rows) == (0, 10)


def test_another_dataset_is_found_out(dataset: Dataset, tmp_path: Path) -> None:
    found = audit(run_with(dataset, tmp_path, (0, 10, "a"), fingerprint="other"))
    assert len(found.problems) == 1
    assert "isn't the one trained on" in found.problems[0]
    assert found.epochs == ()


def test_ledgers_of_any_kind_are_counted_as_by_hand(dataset: Dataset) -> None:
    plan = dataset.plan(SEED)
    rng = np.random.default_rng(0)
    for _ in range(20):
        ledger = [Segment(int(a), int(a + n), "x") for a, n in rng.integers(1, 130, (4, 2))]
        cursor = int(rng.integers(0, 300))
        counted = np.zeros((4, ROWS), np.int64)
        due = np.zeros((4, ROWS), np.int64)
        for epoch in range(4):
            order = plan.row_ids(epoch, 0, ROWS)
            for position in range(ROWS):
                at = epoch * ROWS + position
                counted[epoch, order[position]] += sum(s.start <= at < s.stop for s in ledger)
                due[epoch, order[position]] += at < cursor
        for found in audit_epochs(dataset, plan, ledger, cursor):
            assert named(found.missing) == set(np.flatnonzero(counted[found.epoch] < due[found.epoch]))
            assert named(found.repeated) == set(np.flatnonzero(counted[found.epoch] > due[found.epoch]))


def test_no_checkpoint_and_no_ledger(dataset: Dataset, tmp_path: Path) -> None:
    run = run_with(dataset, tmp_path, (0, 10, "a"))
    with pytest.raises(NotFound):
        audit(run, 7)
    with pytest.raises(Damaged, match="ledger"):
        audit(run_with(dataset, tmp_path, (0, 10, "a"), ledger=[{"start": 1}]))
    assert audit(run, 1).problems == ()
    assert ledger_problems([], 0) == []


def test_the_command_says_it_and_exits_so(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(dataset, tmp_path, (0, 100, "a"))
    command = ["runs", "audit", "audited", "--store", str(tmp_path / "store")]
    assert main(command) == 0
    assert "every row came as often as it should" in capsys.readouterr().out
    run_with(dataset, tmp_path, (0, 30, "a"), (31, 100, "a"), (100, 110, "a", "skipped"))
    assert main(command) == 1
    text = capsys.readouterr().out
    assert "missing: epoch 0, " in text
    assert ".parquet, row group " in text
    assert "skipped on purpose: epoch 1, 10 rows" in text
    assert main([*command, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["epochs"][0]["missing_rows"] == 1
    assert main([*command, "--checkpoint", "1"]) == 0
    assert run.checkpoints().head() == 2
