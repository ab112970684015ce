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
from torch.nn.parallel import DistributedDataParallel

from cluster.errors import BadInput
from cluster.goodput import Kind
from training.facts import ColumnFacts, DatasetFacts
from training.loop import StepReport, TrainState, new_state, train_steps
from training.losses import Poisoned
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
    cursor: int
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
        made.append(FakeBatch(n * rows, (n + 1) * rows, arrays, weight, rows))
    return made


def task(tmp_path: Path) -> RecordingTask:
    return RecordingTask(FACTS, Options(log_dir=str(tmp_path)))


class Quiet:
    """Hooks that only look on."""

    def __init__(self, skips: tuple[int, ...] = (), due: tuple[int, ...] = ()) -> None:
        self.reports: list[StepReport] = []
        self.kinds: list[Kind] = []
        self._skips = skips
        self._due = due

    def is_skipped(self, cursor: int) -> bool:
        return cursor in self._skips

    def is_due(self, step: int) -> bool:
        return step in self._due

    def switch(self, kind: Kind) -> None:
        self.kinds.append(kind)

    def begin_step(self, step: int) -> None: ...
    def on_wrapped(self, model: DistributedDataParallel) -> None: ...
    def on_forward(self) -> None: ...
    def on_backward(self) -> None: ...

    def on_step(self, step: StepReport) -> None:
        self.reports.append(step)


def run_steps(
    of: RecordingTask,
    state: TrainState,
    some: list[FakeBatch],
    total: int = 20,
    hooks: Quiet | None = None,
    spike_factor: float | None = None,
    **settings: object,
) -> list[StepReport]:
    hooks = hooks or Quiet()
    optimization = Optimization.model_validate({"learning_rate": 0.01, "warmup_steps": 4} | settings)
    train_steps(
        of,
        state,
        some,
        optimization,
        total_steps=total,
        device=CPU,
        hooks=hooks,
        spike_factor=spike_factor,
    )
    return hooks.reports


def same(one: TrainState, other: TrainState) -> bool:
    """Bit for bit, optimizer included."""
    weights = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    moments = zip(_moments(one), _moments(other), strict=True)
    return all(torch.equal(a, b) for a, b in (*weights, *moments))


def _moments(state: TrainState) -> list[torch.Tensor]:
    return [v for p in state.model.parameters() for v in state.optimizer.state[p].values()]


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


@pytest.mark.parametrize(("due", "told_after"), [((), 10), ((5,), 5)])
def test_the_step_that_ruins_the_weights_is_named(
    tmp_path: Path, due: tuple[int, ...], told_after: int
) -> None:
    of = task(tmp_path)
    some = batches(10)
    some[3].arrays["x"][0] = np.nan
    state = new_state(of, Optimization(), CPU)
    with pytest.raises(Poisoned, match="not a finite number at step 4") as caught:
        run_steps(of, state, some, hooks=Quiet(due=due))
    assert (caught.value.step, caught.value.start, caught.value.stop) == (4, 48, 64)
    assert state.step == told_after


def test_a_gradient_that_is_not_finite_counts_too(tmp_path: Path) -> None:
    class Cusp(RecordingTask):
        def loss(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
            return (super().loss(model, batch) * 0).sqrt()  # 0, but its slope isn't a number

    cusp = Cusp(FACTS, Options(log_dir=str(tmp_path)))
    with pytest.raises(Poisoned, match="at step 1"):
        run_steps(cusp, new_state(cusp, Optimization(), CPU), batches(1), total=1)


def test_a_spike_is_told_from_what_is_usual(tmp_path: Path) -> None:
    of = task(tmp_path)
    some = batches(40)
    some[33].arrays["x"][:] = 1e4
    state = new_state(of, Optimization(), CPU)
    with pytest.raises(Poisoned, match="over 50 times the usual") as caught:
        run_steps(of, state, some, total=40, spike_factor=50.0)
    assert caught.value.step == 34
    run_steps(of, new_state(of, Optimization(), CPU), some, total=40)  # not without being asked


def test_a_batch_left_out_is_a_step_that_moves_nothing(tmp_path: Path) -> None:
    of = task(tmp_path)
    state, other = (new_state(of, Optimization(), CPU) for _ in range(2))
    some = batches(6)
    reports = run_steps(of, state, some, total=6, hooks=Quiet(skips=(32,)))
    assert [r.skipped for r in reports] == [False, False, True, False, False, False]
    assert (state.step, state.cursor) == (6, 96)
    run_steps(of, other, some[:2], total=6)
    other.step, other.cursor = 3, 48
    run_steps(of, other, some[3:], total=6)
    assert same(state, other)


def test_whatever_is_raised_the_state_is_that_of_the_last_finished_step(tmp_path: Path) -> None:
    class Breaks(RecordingTask):
        broken = False

        def build_model(self) -> torch.nn.Module:
            return torch.nn.ModuleDict({"line": super().build_model(), "norm": torch.nn.BatchNorm1d(1)})

        def loss(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
            x = model["norm"](batch["x"].unsqueeze(1)).squeeze(1)  # type: ignore[index]
            loss = (model["line"](batch["id"], x) - batch[TARGET]) ** 2  # type: ignore[index]
            if self.broken:
                raise ConnectionError("a peer is gone")
            return loss

    of = Breaks(FACTS, Options(log_dir=str(tmp_path)))
    state, smooth = (new_state(of, Optimization(), CPU) for _ in range(2))
    run_steps(of, state, batches(3))
    of.broken = True
    with pytest.raises(ConnectionError):
        run_steps(of, state, batches(4)[3:])
    assert state.step == 3
    of.broken = False
    run_steps(of, state, batches(6)[3:])
    run_steps(of, smooth, batches(6))
    assert same(state, smooth)


def test_a_state_says_whether_an_unjudged_step_has_ruined_it(tmp_path: Path) -> None:
    class Leaving(Quiet):
        def on_step(self, step: StepReport) -> None:
            if step.step == 6:
                raise ConnectionError("a peer is gone")

    of = task(tmp_path)
    for poison, sound in ((None, True), (3, False)):
        some = batches(8)
        if poison is not None:
            some[poison].arrays["x"][0] = np.nan
        state = new_state(of, Optimization(), CPU)
        with pytest.raises(ConnectionError):
            run_steps(of, state, some, hooks=Leaving())
        assert (state.step, state.sound) == (6, sound)


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
