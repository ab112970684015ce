"""The servable is measured over every held-out row, and an older one only where that means something."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn import metrics as reference

from cluster.errors import BadInput, NotFound
from training.data.columns import model_arrays
from training.data.dataset import Dataset
from training.data.samples import write_breast_cancer, write_digits
from training.evaluate import Evaluation, evaluate, evaluate_live
from training.export import export
from training.gate import Incomparable
from training.servable import Servable
from training.task import Task
from training.tasks import build_task


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for one another are slow on a machine that does other things too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(task: Task, dataset: Dataset, *, epochs: int, batch: int, rate: float) -> torch.nn.Module:
    """The plainest training loop there is."""
    columns = [*task.input_names, task.facts.label]
    table = dataset.read_rows(np.arange(dataset.rows), columns)
    arrays = model_arrays(table, task.signature(), task.vocabularies(), task.facts)
    tensors = {name: torch.from_numpy(values) for name, values in arrays.items()}
    torch.manual_seed(0)
    model = task.build_model()
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    steps = epochs * (dataset.rows // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    order = torch.cat([torch.randperm(dataset.rows) for _ in range(epochs)])
    for step in range(steps):
        rows = order[step * batch : (step + 1) * batch]
        loss = task.loss(model, {name: values[rows] for name, values in tensors.items()}).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def test_digits_are_learnt_and_measured_as_they_will_be_served(tmp_path: Path) -> None:
    train, held_out = (Dataset.open(uri) for uri in write_digits(str(tmp_path)))
    task = build_task("image-classification", train.facts("label"), {})
    model = trained(task, train, epochs=5, batch=64, rate=3e-3)
    result = evaluate(export(task, model), held_out, task)
    assert result.rows == held_out.rows
    assert result.metrics["accuracy"] >= 0.97
    assert result.metrics["log_loss"] < 0.15


def test_breast_cancer_is_learnt_from_the_raw_columns(tmp_path: Path) -> None:
    train, held_out = (Dataset.open(uri) for uri in write_breast_cancer(str(tmp_path)))
    task = build_task("tabular-classification", train.facts("label"), {})
    model = trained(task, train, epochs=10, batch=64, rate=2e-3)
    assert evaluate(export(task, model), held_out, task).metrics["accuracy"] >= 0.95


def write(folder: Path, **columns: Any) -> Dataset:
    """A dataset of two files, several row groups."""
    folder.mkdir(exist_ok=True)
    table = pa.table(columns)
    half = table.num_rows // 2
    for name, part in (("a", table.slice(0, half)), ("b", table.slice(half))):
        pq.write_table(part, folder / f"{name}.parquet", row_group_size=7)
    return Dataset.open(str(folder))


def houses(folder: Path, rows: int = 50, seed: int = 0, **more: Any) -> Dataset:
    """Rooms and a place, either of which may be missing, and a price that follows from them."""
    rng = np.random.default_rng(seed)
    rooms = rng.integers(1, 9, rows).astype(float)
    places = rng.choice(["inland", "near ocean"], rows)
    price = 1e5 * rooms + 5e4 * (places == "near ocean") + rng.normal(0, 1e4, rows)
    rooms[rng.random(rows) < 0.1] = np.nan
    shown = [None if rng.random() < 0.1 else str(place) for place in places]
    return write(folder, rooms=rooms, place=shown, label=price, **more)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Task, dict[str, bytes]]:
    """Houses, the task of pricing them, and a servable that has not learnt it."""
    dataset = houses(tmp_path_factory.mktemp("houses"))
    task = build_task("tabular-regression", dataset.facts("label"), {"width": 8, "depth": 1})
    torch.manual_seed(0)
    return dataset, task, export(task, task.build_model())


@pytest.mark.parametrize("batch_rows", [1, 7, 50, 256])
def test_every_row_counts_once_however_they_are_batched(
    made: tuple[Dataset, Task, dict[str, bytes]], batch_rows: int
) -> None:
    dataset, task, files = made
    table = dataset.read_rows(np.arange(dataset.rows), ["rooms", "place", "label"])
    inputs = {
        "rooms": table["rooms"].to_numpy().astype(np.float32),
        "place": np.array([place or "" for place in table["place"].to_pylist()], dtype=object),
    }
    values, truth = Servable(files).run(inputs)["value"], table["label"].to_numpy()
    result = evaluate(files, dataset, task, batch_rows)
    assert result.rows == 50
    assert result.metrics == pytest.approx(
        {
            "r2": reference.r2_score(truth, values),
            "rmse": reference.root_mean_squared_error(truth, values),
            "mae": reference.mean_absolute_error(truth, values),
        },
        rel=1e-4,
    )


def test_a_classifiers_metrics_are_those_of_its_labels_and_probabilities(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dataset = write(tmp_path, x=rng.normal(size=40), label=[f"class {i}" for i in rng.integers(0, 3, 40)])
    task = build_task("tabular-classification", dataset.facts("label"), {"width": 8})
    files = export(task, task.build_model())
    table = dataset.read_rows(np.arange(40), ["x", "label"])
    outputs = Servable(files).run({"x": table["x"].to_numpy().astype(np.float32)})
    truth = table["label"].to_pylist()
    assert evaluate(files, dataset, task).metrics == pytest.approx(
        {
            "accuracy": reference.accuracy_score(truth, outputs["label"].tolist()),
            "log_loss": reference.log_loss(truth, outputs["probabilities"]),
        },
        rel=1e-4,
    )


def test_a_constant_target_has_an_r2_that_json_can_hold(
    made: tuple[Dataset, Task, dict[str, bytes]],
) -> None:
    task, same = made[1], np.full(3, 2.0, np.float32)
    assert task.metrics({"value": same}, same)["r2"] == 1
    assert task.metrics({"value": same + 1}, same)["r2"] == 0


def test_the_live_version_is_measured_on_new_data_of_the_same_kind(
    made: tuple[Dataset, Task, dict[str, bytes]], tmp_path: Path
) -> None:
    # The new data has a column more, which the older version doesn't take.
    newer = houses(tmp_path, seed=1, garden=np.ones(50))
    task = build_task("tabular-regression", newer.facts("label"), {"width": 8})
    live = evaluate_live(made[2], newer, task)
    assert isinstance(live, Evaluation)
    assert live.metrics == evaluate(made[2], newer, made[1]).metrics


def classes(folder: Path, *names: str) -> Dataset:
    return write(folder, x=np.arange(20.0), label=[names[i % len(names)] for i in range(20)])


def test_a_live_version_that_answers_another_question_is_incomparable(
    made: tuple[Dataset, Task, dict[str, bytes]], tmp_path: Path
) -> None:
    _, price, files = made
    narrower = write(tmp_path / "narrower", rooms=np.arange(20.0), label=np.arange(20.0))
    without_place = build_task("tabular-regression", narrower.facts("label"), {"width": 8})
    two, three = classes(tmp_path / "two", "no", "yes"), classes(tmp_path / "three", "maybe", "no", "yes")
    old = build_task("tabular-classification", two.facts("label"), {"width": 8, "depth": 0})
    old_files = export(old, old.build_model())
    new = build_task("tabular-classification", three.facts("label"), {"width": 8})
    other = classes(tmp_path / "other", "left", "right")
    turned = build_task("tabular-classification", other.facts("label"), {"width": 8})
    for result, part in (
        (evaluate_live(files, narrower, without_place), "has no column 'place'"),
        (evaluate_live(old_files, three, new), "doesn't give the task's output 'probabilities'"),
        (evaluate_live(old_files, other, turned), "has other classes than the task"),
        (evaluate_live(old_files, made[0], price), "doesn't give the task's output 'value'"),
        (evaluate_live({"model.ubj": b""}, made[0], price), "has no graph.onnx"),
    ):
        assert isinstance(result, Incomparable)
        assert part in result.reason


def test_a_servable_measured_by_mistake_is_refused_in_four_parts(
    made: tuple[Dataset, Task, dict[str, bytes]], tmp_path: Path
) -> None:
    _, price, files = made
    with pytest.raises(NotFound):
        evaluate({}, made[0], price)
    two = classes(tmp_path, "no", "yes")
    with pytest.raises(BadInput) as caught:
        evaluate(files, two, build_task("tabular-classification", two.facts("label"), {"width": 8}))
    assert all((caught.value.got, caught.value.allowed, caught.value.fix))


def test_a_task_whose_metrics_contradict_themselves_is_refused(
    made: tuple[Dataset, Task, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, task, files = made
    monkeypatch.setattr(type(task), "greater_is_better", {"r2": True})
    with pytest.raises(BadInput, match="other metrics than greater_is_better"):
        evaluate(files, dataset, task)
