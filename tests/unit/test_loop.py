"""The training loop: resuming is exact, padding counts for nothing, accumulation changes nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recording_task import Options, RecordingTask

from cluster.errors import BadInput, Conflict, Damaged, RunFailed
from cluster.manifest import Manifest
from cluster.runs import Run
from cluster.storage import memory_store
from training.checkpoint import (
    WEIGHTS,
    CheckpointMeta,
    CheckpointWriter,
    is_finite,
    load_state,
    restore,
    state_files,
)
from training.facts import ColumnFacts, DatasetFacts
from training.loop import StepReport, TrainState, new_state, train_steps
from training.recipe import Optimization
from training.schedule import learning_rate
from training.task import TARGET, Arrays, Tensors

CPU = torch.device("cpu")
FACTS = DatasetFacts(
    fingerprint="f",
    rows=320,
    columns={name: ColumnFacts(kind="number") for name in ("id", "x", "y")},
    label="y",
)


@dataclass(frozen=True)
class FakeBatch:
    next_cursor: int
    arrays: Arrays
    weight: np.ndarray
    global_rows: int
    epoch: int = 0


def batches(count: int, rows: int = 16, padding: int = 0) -> list[FakeBatch]:
    made = []
    for n in range(count):
        rng = np.random.default_rng(n)
        x = rng.normal(size=rows + padding).astype(np.float32)
        weight = np.ones(rows + padding, np.float32)
        if padding:
            weight[-padding:] = 0
            x[-padding:] = 1e3
        arrays = {"id": np.zeros_like(x), "x": x, TARGET: 3 * x + 1}
        made.append(FakeBatch((n + 1) * rows, arrays, weight, rows))
    return made


def task(tmp_path: Path) -> RecordingTask:
    return RecordingTask(FACTS, Options(log_dir=str(tmp_path)))


def run_steps(
    of: RecordingTask, state: TrainState, some: list[FakeBatch], total: int = 20, **settings: object
) -> list[StepReport]:
    reports: list[StepReport] = []
    optimization = Optimization.model_validate({"learning_rate": 0.01, "warmup_steps": 4} | settings)
    train_steps(of, state, some, optimization, total_steps=total, device=CPU, on_step=reports.append)
    return reports


def weights(state: TrainState) -> bytes:
    return state_files(state)[WEIGHTS]


def test_kill_and_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path: Path) -> None:
    of = task(tmp_path)
    whole = new_state(of, Optimization(), CPU)
    run_steps(of, whole, batches(20))

    first = new_state(of, Optimization(), CPU)
    run_steps(of, first, batches(20)[:11])
    files = state_files(first)
    second = new_state(of, Optimization(seed=99), CPU)
    load_state(second, CheckpointMeta(step=11, cursor=176, fingerprint="f", ledger=()), files.__getitem__)
    run_steps(of, second, batches(20)[11:])

    assert weights(second) == weights(whole)
    assert state_files(second) == state_files(whole)
    assert (second.step, second.cursor) == (20, 320)


def test_padding_rows_count_for_nothing(tmp_path: Path) -> None:
    of = task(tmp_path)
    plain, padded = (new_state(of, Optimization(), CPU) for _ in range(2))
    run_steps(of, plain, batches(5))
    some = batches(5, padding=7)
    for batch, bare in zip(some, batches(5), strict=True):
        for name, array in bare.arrays.items():
            batch.arrays[name][:16] = array
    run_steps(of, padded, some)
    for a, b in zip(plain.model.parameters(), padded.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_gradient_accumulation_gives_the_same_model(tmp_path: Path) -> None:
    of = task(tmp_path)
    whole, parts = (new_state(of, Optimization(), CPU) for _ in range(2))
    run_steps(of, whole, batches(8))
    run_steps(of, parts, batches(8), micro_batch_size=5)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_reports_carry_the_mean_loss_every_ten_steps_and_at_the_end(tmp_path: Path) -> None:
    of = task(tmp_path)
    reports = run_steps(of, new_state(of, Optimization(), CPU), batches(13), total=13)
    assert [r.step for r in reports] == list(range(1, 14))
    assert [r.step for r in reports if r.loss is not None] == [10, 13]
    assert all(math.isfinite(r.loss) for r in reports if r.loss is not None)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    of = task(tmp_path)
    some = batches(10)
    some[3].arrays["x"][0] = np.nan
    state = new_state(of, Optimization(), CPU)
    run_steps(of, state, some[:3])
    assert is_finite(state)
    with pytest.raises(RunFailed, match="not a finite number by step 10"):
        run_steps(of, state, some[3:])
    assert not is_finite(state), "such a state is never committed"


def test_a_reduced_loss_is_refused(tmp_path: Path) -> None:
    class Reduced(RecordingTask):
        def loss(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
            return super().loss(model, batch).mean()

    of = Reduced(FACTS, Options(log_dir=str(tmp_path)))
    with pytest.raises(BadInput, match="one loss a row"):
        run_steps(of, new_state(of, Optimization(), CPU), batches(1))


@given(st.integers(1, 2000), st.integers(0, 3000), st.floats(0, 1))
def test_the_learning_rate_stays_between_its_bounds(total: int, warmup: int, floor: float) -> None:
    optimization = Optimization(learning_rate=0.1, warmup_steps=warmup, min_learning_rate_ratio=floor)
    rates = [learning_rate(step, total, optimization) for step in range(0, total, max(1, total // 50))]
    assert all(0 < rate <= 0.1 + 1e-12 for rate in rates)
    after = [learning_rate(step, total, optimization) for step in range(min(warmup, total), total)]
    assert after == sorted(after, reverse=True)


def meta_at(state: TrainState) -> CheckpointMeta:
    start = CheckpointMeta(step=0, cursor=0, fingerprint="f", ledger=())
    return start.extended(step=state.step, cursor=state.cursor, attempt="a", workers=1)


class Told:
    def __init__(self) -> None:
        self.committed: list[Manifest] = []
        self.failed: list[Exception] = []


def writer(run: Run, told: Told, newest: int = 0, keep: int = 2) -> CheckpointWriter:
    return CheckpointWriter(
        run, newest=newest, keep=keep, on_commit=told.committed.append, on_failure=told.failed.append
    )


def test_the_writer_commits_keeps_the_newest_and_leaves_every_manifest(tmp_path: Path) -> None:
    of, told = task(tmp_path), Told()
    run = Run(memory_store(), "r")
    state = new_state(of, Optimization(), CPU)
    write = writer(run, told)
    for batch in batches(5):
        run_steps(of, state, [batch])
        write.submit(state_files(state), meta_at(state))
    run_steps(of, state, batches(6)[5:])
    write.finish(state_files(state), meta_at(state))

    assert [m.number for m in told.committed] == [1, 2, 3, 4, 5, 6]
    assert not told.failed
    assert len(run.store.keys("runs/r/checkpoints")) == 6 + 2 * 2
    fresh = new_state(of, Optimization(seed=5), CPU)
    found = restore(fresh, run.checkpoints(), lambda number, error: pytest.fail(str(error)))
    assert found is not None
    assert found.number == 6
    assert weights(fresh) == weights(state)
    assert [(s.start, s.stop) for s in found.meta.ledger] == [(0, 96)]


def test_restore_falls_back_past_a_damaged_checkpoint_and_says_so(tmp_path: Path) -> None:
    of, told = task(tmp_path), Told()
    run = Run(memory_store(), "r")
    state = new_state(of, Optimization(), CPU)
    write = writer(run, told)
    kept = []
    for batch in batches(2):
        run_steps(of, state, [batch])
        kept.append(weights(state))
        write.submit(state_files(state), meta_at(state))
    write.close()
    key = told.committed[1].files[WEIGHTS].key
    data = bytearray(run.store.get(key))
    data[-1] ^= 1
    run.store.put(key, bytes(data))

    passed_over: list[int] = []
    fresh = new_state(of, Optimization(), CPU)
    found = restore(fresh, run.checkpoints(), lambda number, error: passed_over.append(number))
    assert found is not None
    assert (found.number, passed_over) == (1, [2])
    assert weights(fresh) == kept[0]

    run.store.delete([told.committed[0].files[WEIGHTS].key])
    with pytest.raises(Damaged, match="no checkpoint of the run is whole"):
        restore(fresh, run.checkpoints(), lambda number, error: None)


def test_a_second_driver_of_the_run_is_told(tmp_path: Path) -> None:
    of, told = task(tmp_path), Told()
    run = Run(memory_store(), "r")
    state = new_state(of, Optimization(), CPU)
    ours, theirs = writer(run, told), writer(run, Told())
    theirs.submit(state_files(state), meta_at(state))
    theirs.close()
    with pytest.raises(Conflict, match="another writer"):
        ours.finish(state_files(state), meta_at(state))
    ours.close()


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    of = task(tmp_path)
    state = new_state(of, Optimization(), CPU)
    other = TrainState(torch.nn.Linear(2, 2), torch.optim.AdamW(torch.nn.Linear(2, 2).parameters()))
    with pytest.raises(Damaged, match="not those of this model"):
        load_state(other, meta_at(state), state_files(state).__getitem__)
