"""Tasks: found by name, checked against options and data, and models that do what is said of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import task_facts
import torch

from cluster.errors import BadInput
from training.export import export
from training.facts import ColumnFacts
from training.servable import Servable
from training.task import TARGET, Task
from training.tasks import BUILT_IN, build_task, resolve_task

OWN_TASK = '''
"""A user's own task: the length of a vector."""
import torch
from cluster.signature import Signature, Tensor
from training.task import TARGET, Task

class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.by = torch.nn.Parameter(torch.tensor(0.5))
    def forward(self, vectors):
        return vectors.square().sum(dim=1).sqrt() * self.by

class Length(Task):
    def build_model(self):
        return Scale()
    def loss(self, model, batch):
        return (self.forward(model, batch) - batch[TARGET]).square()
    def signature(self):
        return Signature(
            task="length",
            inputs=(Tensor(name="vector", dtype="FP32", shape=(-1, 3)),),
            outputs=(Tensor(name="length", dtype="FP32", shape=(-1,)),),
        )

class Half(Task):
    def build_model(self):
        return Scale()

NOT_A_TASK = 3
'''


@pytest.fixture
def own_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package in a folder of its own, as a user's would be."""
    package = tmp_path / "mine_for_tests"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "tasks.py").write_text(OWN_TASK)
    (package / "broken.py").write_text("import a_module_that_is_not_there")
    (package / "raises.py").write_text("raise ValueError('no licence')")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "mine_for_tests.tasks"
    for name in [name for name in sys.modules if name.startswith("mine_for_tests")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_tasks_are_found_under_the_name_that_they_give(name: str) -> None:
    assert resolve_task(name).name == name


def test_a_users_own_task_is_imported_trained_and_exported(own_package: str) -> None:
    task = build_task(f"{own_package}:Length", task_facts.facts({}, task_facts.PRICE), {})
    torch.manual_seed(0)
    model = task.build_model()
    batch = {"vector": torch.tensor([[3.0, 4.0, 0.0]]), TARGET: torch.tensor([5.0])}
    task.loss(model, batch).mean().backward()
    assert next(model.parameters()).grad == pytest.approx(-25.0)
    outputs = Servable(export(task, model)).run({"vector": batch["vector"].numpy()})
    assert outputs["length"] == pytest.approx([2.5])
    assert task.metrics(outputs, np.array([5.0])) == {}


@pytest.mark.parametrize(
    ("name", "got", "fix"),
    [
        ("image-clasification", "'image-clasification'", "did you mean 'image-classification'?"),
        ("chess", "'chess'", "choose one, or name a class of your own"),
        ("not_there.tasks:Mine", "no module named 'not_there'", "PYTHONPATH"),
        ("mine_for_tests.broken:Mine", "no module named 'a_module_that_is_not_there'", "PYTHONPATH"),
        ("mine_for_tests.raises:Mine", "ValueError: no licence", "python -c"),
        ("mine_for_tests.tasks:Lengh", "no 'Lengh' in 'mine_for_tests.tasks'", "class Lengh(Task)"),
        ("mine_for_tests.tasks:NOT_A_TASK", "3", "class NOT_A_TASK(Task)"),
        ("mine_for_tests.tasks:Half", "methods not written: loss, signature", "write loss, signature"),
        ("mine_for_tests..tasks:Half", "mine_for_tests", "import"),
    ],
)
def test_what_is_not_a_task_is_refused_in_four_parts(own_package: str, name: str, got: str, fix: str) -> None:
    with pytest.raises(BadInput) as caught:
        resolve_task(name)
    assert got in caught.value.got
    assert fix in caught.value.fix
    assert caught.value.allowed


@pytest.mark.parametrize(
    ("options", "got"),
    [({"widht": 8}, "unknown key 'widht'"), ({"width": 12}, "12"), ({"depth": "deep"}, "'deep'")],
)
def test_options_are_checked_like_a_recipes_other_keys(options: dict[str, Any], got: str) -> None:
    with pytest.raises(BadInput) as caught:
        build_task("image-classification", task_facts.image_facts(), options)
    assert "the options of image-classification" in caught.value.failed
    assert caught.value.got == got


UNFIT: dict[str, tuple[str, dict[str, ColumnFacts], ColumnFacts, dict[str, Any]]] = {
    "no images": ("image-classification", task_facts.TABLE, task_facts.DIGITS, {}),
    "a quantity to classify": ("tabular-classification", task_facts.TABLE, task_facts.PRICE, {}),
    "classes to regress": (
        "tabular-regression",
        task_facts.TABLE,
        ColumnFacts(kind="category", categories=("a", "b")),
        {},
    ),
    "free text": (
        "tabular-regression",
        {**task_facts.TABLE, "text": ColumnFacts(kind="text")},
        task_facts.PRICE,
        {},
    ),
    "no columns": ("tabular-regression", {}, task_facts.PRICE, {}),
    "all excluded": (
        "tabular-regression",
        {"v3": task_facts.TABLE["v3"]},
        task_facts.PRICE,
        {"exclude": ["v3"]},
    ),
    "a column like an output": (
        "tabular-regression",
        {"value": task_facts.TABLE["v3"]},
        task_facts.PRICE,
        {},
    ),
    "a column no tensor can be called": (
        "tabular-regression",
        {"line\nbreak": task_facts.TABLE["v3"]},
        task_facts.PRICE,
        {},
    ),
    "excluded but not there": ("tabular-regression", task_facts.TABLE, task_facts.PRICE, {"exclude": ["id"]}),
}


@pytest.mark.parametrize("case", UNFIT)
def test_data_that_a_task_cannot_use_is_refused_in_four_parts(case: str) -> None:
    name, columns, target, options = UNFIT[case]
    with pytest.raises(BadInput) as caught:
        build_task(name, task_facts.facts(columns, target), options)
    assert all((caught.value.got, caught.value.allowed, caught.value.fix))


def test_integers_with_few_values_may_be_regressed_to() -> None:
    target = ColumnFacts(kind="category", categories=("1", "2", "3"), mean=2.0, std=0.5)
    task = build_task("tabular-regression", task_facts.facts(task_facts.TABLE, target), {})
    assert task.facts.labels == ()
    assert task.signature().labels is None


def test_the_base_class_measures_nothing_so_that_no_gate_can_be_set_on_it() -> None:
    assert Task.greater_is_better == {}


@pytest.mark.parametrize(
    ("height", "width", "channels"), [(8, 8, 1), (11, 8, 3), (28, 28, 1), (64, 48, 3), (224, 224, 3)]
)
def test_images_of_any_size_become_logits(height: int, width: int, channels: int) -> None:
    task = build_task("image-classification", task_facts.image_facts(height, width, channels), {"width": 8})
    model = task.build_model()
    images = torch.randint(0, 256, (2, height, width, channels), dtype=torch.uint8)
    assert model(images).shape == (2, 10)


@pytest.mark.parametrize("name", ["image-classification", "tabular-regression"])
def test_a_rows_result_does_not_depend_on_its_batch(name: str) -> None:
    is_image = name.startswith("image")
    known = task_facts.image_facts() if is_image else task_facts.facts(task_facts.TABLE, task_facts.PRICE)
    task = build_task(name, known, {"width": 16})
    torch.manual_seed(0)
    model = task.build_model()
    rng = np.random.default_rng(0)
    columns = [
        torch.from_numpy(np.zeros(len(a), np.int64) if a.dtype == object else a)
        for a in task.example_inputs(6, rng).values()
    ]
    together = model(*columns)
    alone = torch.cat([model(*(column[i : i + 1] for column in columns)) for i in range(6)])
    torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-6)


def test_augmentation_is_off_unless_asked_for_and_then_only_shifts() -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 16, 16, 3)).astype(np.uint8)
    plain = build_task("image-classification", task_facts.image_facts(16, 16, 3), {})
    assert plain.augment({"image": images}, rng)["image"] is images

    task = build_task("image-classification", task_facts.image_facts(16, 16, 3), {"augment": True})
    shifted = task.augment({"image": images}, np.random.default_rng(1))["image"]
    again = task.augment({"image": images}, np.random.default_rng(1))["image"]
    assert np.array_equal(shifted, again)
    assert (shifted.shape, shifted.dtype) == (images.shape, images.dtype)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), mode="edge")
    for row in range(64):
        places = [(y, x) for y in range(5) for x in range(5)]
        assert any(np.array_equal(padded[row, y : y + 16, x : x + 16], shifted[row]) for y, x in places)


def test_tables_stand_missing_constant_absurd_and_unseen_values() -> None:
    task = build_task("tabular-regression", task_facts.facts(task_facts.TABLE, task_facts.PRICE), {})
    model = task.build_model()
    numbers = torch.tensor([float("nan"), float("inf"), -3e38, 7.0])
    unseen = torch.zeros(4, dtype=torch.int64)
    values = model(numbers, numbers, numbers, unseen, unseen)
    assert values.shape == (4,)
    assert values.isfinite().all()


def test_an_unseen_word_is_neutral_where_training_had_nothing_to_learn_it_from() -> None:
    columns = {"colour": ColumnFacts(kind="category", categories=("green", "red"))}
    task = build_task("tabular-regression", task_facts.facts(columns, task_facts.PRICE), {})
    model = task.build_model()
    batch = {"colour": torch.tensor([0, 1]), TARGET: torch.tensor([5e4, 5e4])}
    task.loss(model, batch).sum().backward()
    (embedding,) = model.embeddings
    assert not embedding.weight[0].any()
    assert not embedding.weight.grad[0].any()
    assert embedding.weight.grad[1].any()


@pytest.mark.parametrize("name", ["tabular-classification", "tabular-regression"])
def test_losses_are_one_number_a_row(name: str) -> None:
    target = task_facts.DIGITS if "class" in name else task_facts.PRICE
    task = build_task(name, task_facts.facts({"v3": task_facts.TABLE["v3"]}, target), {})
    labels = torch.tensor([1, 2, 3]) if "class" in name else torch.tensor([5e4, 4.9e4, 5.1e4])
    loss_B = task.loss(task.build_model(), {"v3": torch.zeros(3), TARGET: labels})
    assert (loss_B.shape, loss_B.dtype) == ((3,), torch.float32)
