"""The exported graph gives what the model gives, and carries nothing of the machine that made it."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import onnx
import pytest
import task_facts
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import training.export
from cluster.config import Frozen
from cluster.errors import BadInput, TandemError
from cluster.signature import Signature, Tensor
from training.data.words import encode_words
from training.export import OPSET, export
from training.parity import TOLERANCE, check_parity, relative_difference
from training.servable import Servable
from training.task import Arrays, Task
from training.tasks import build_task

VALUE = Tensor(name="value", dtype="FP32", shape=(-1,))
X = Tensor(name="x", dtype="FP32", shape=(-1, 2))
WORDS = ("a", "A", "ä", "a\u0308", "日本", "🦕", " ", "a ", "\x00", "x\x00y", "line\nbreak", "\ufeff")


def of_image() -> Task:
    return build_task("image-classification", task_facts.image_facts(8, 9, 3), {"width": 8})


def of_table(name: str) -> Task:
    target = task_facts.DIGITS if name == "tabular-classification" else task_facts.PRICE
    return build_task(name, task_facts.facts(task_facts.TABLE, target), {"width": 16})


class Made(Task):
    """A task made of a signature and a function on tensors."""

    def __init__(self, signature: Signature, function: Any, words: dict[str, tuple[str, ...]] | None = None):
        super().__init__(task_facts.facts({}, task_facts.PRICE), Frozen())
        self._signature, self._function, self._words = signature, function, words or {}

    def build_model(self) -> torch.nn.Module:
        function = self._function

        class Model(torch.nn.Module):
            def forward(self, *inputs: torch.Tensor) -> Any:
                return function(*inputs)

        return Model()

    def loss(self, model: torch.nn.Module, batch: Any) -> torch.Tensor:
        raise NotImplementedError

    def signature(self) -> Signature:
        return self._signature

    def vocabularies(self) -> dict[str, tuple[str, ...]]:
        return self._words


def made(function: Any, *outputs: Tensor, inputs: tuple[Tensor, ...] = (X,), **rest: Any) -> Made:
    return Made(Signature(task="made", inputs=inputs, outputs=outputs or (VALUE,)), function, **rest)


@pytest.fixture(
    scope="module",
    params=[of_image, lambda: of_table("tabular-classification"), lambda: of_table("tabular-regression")],
    ids=["image", "classes", "value"],
)
def exported(request: pytest.FixtureRequest) -> tuple[Task, torch.nn.Module, dict[str, bytes]]:
    """A task, a model as training leaves it, and its servable."""
    task = request.param()
    torch.manual_seed(0)
    model = task.build_model().train()
    return task, model, export(task, model)


def by_torch(task: Task, model: torch.nn.Module, arrays: Arrays) -> np.ndarray[Any, Any]:
    """What the model itself gives for raw inputs, words looked up as in training."""
    words = task.vocabularies()
    tensors = [
        torch.from_numpy(encode_words(arrays[name], words[name]) if name in words else arrays[name])
        for name in task.input_names
    ]
    with torch.no_grad():
        return task.graph(model).eval()(*tensors).numpy()


@given(rows=st.integers(1, 33), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_graph_gives_what_the_model_gives(
    exported: tuple[Task, torch.nn.Module, dict[str, bytes]], rows: int, seed: int
) -> None:
    task, model, files = exported
    arrays = task.example_inputs(rows, np.random.default_rng(seed))
    outputs = Servable(files).run(arrays)
    main = outputs["probabilities" if "probabilities" in outputs else "value"]
    assert relative_difference(by_torch(task, model, arrays), main) < TOLERANCE
    if task.facts.labels:
        assert outputs["probabilities"].sum(axis=1) == pytest.approx(1, abs=1e-5)
        likeliest = outputs["probabilities"].argmax(axis=1)
        assert outputs["label"].tolist() == [task.facts.labels[i] for i in likeliest]


def test_examples_hold_missing_and_unseen_values() -> None:
    arrays = of_table("tabular-regression").example_inputs(200, np.random.default_rng(0))
    assert np.isnan(arrays["v3"]).any()
    assert {"", "red"} < set(arrays["colour"])
    assert set(arrays["colour"]) - {"", *task_facts.TABLE["colour"].categories}


def test_the_model_is_left_as_it_is(exported: tuple[Task, torch.nn.Module, dict[str, bytes]]) -> None:
    task, model, files = exported
    model.train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng_state = torch.get_rng_state()
    again = export(task, model)
    assert torch.equal(rng_state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad and p.grad is not None for p in model.parameters())
    assert again == files, "the same weights give the same bytes"


def test_nothing_of_the_machine_is_in_the_graph(
    exported: tuple[Task, torch.nn.Module, dict[str, bytes]],
) -> None:
    graph = exported[2]["graph.onnx"]
    for secret in (os.getcwd(), "site-packages", ".py", "training.", "torch", "aten", "forward"):
        assert secret.encode() not in graph, secret


def test_the_graph_is_one_plain_file_of_a_stated_opset(
    exported: tuple[Task, torch.nn.Module, dict[str, bytes]],
) -> None:
    task, _, files = exported
    model = onnx.load_from_string(files["graph.onnx"])
    onnx.checker.check_model(model, full_check=True)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": OPSET, "ai.onnx.ml": 3}
    assert not model.functions
    assert all(not tensor.external_data for tensor in model.graph.initializer)
    assert [value.name for value in model.graph.input] == list(task.input_names)
    assert [value.name for value in model.graph.output] == [t.name for t in task.signature().outputs]
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert Signature.model_validate_json(files["signature.json"]) == task.signature()
    assert json.loads(files["signature.json"])["task"] == task.name


@pytest.fixture(scope="module")
def look_up() -> Servable:
    """A graph that gives the index of each word."""
    task = made(
        lambda indices: indices + 0,
        Tensor(name="index", dtype="INT64", shape=(-1,)),
        inputs=(Tensor(name="word", dtype="BYTES", shape=(-1,), nullable=True),),
        words={"word": WORDS},
    )
    return Servable(export(task, task.build_model()))


@given(words=st.lists(st.one_of(st.sampled_from(WORDS), st.just(""), st.text(max_size=5)), min_size=1))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_words_are_looked_up_as_in_training(look_up: Servable, words: list[str]) -> None:
    values = np.array(words, dtype=object)
    assert look_up.run({"word": values})["index"].tolist() == encode_words(values, WORDS).tolist()


def test_every_word_has_its_own_index_and_the_empty_one_none(look_up: Servable) -> None:
    values = np.array([*WORDS, ""], dtype=object)
    assert look_up.run({"word": values})["index"].tolist() == [*range(1, len(WORDS) + 1), 0]


def test_outputs_may_be_inputs_constants_or_the_same_tensor_twice() -> None:
    outputs = [Tensor(name=name, dtype="FP32", shape=(-1, 2)) for name in ("same", "again", "sum", "twice")]
    task = made(lambda x: (x, x, x + x, x + x), *outputs)
    x = np.array([[1, 2]], np.float32)
    given_back = Servable(export(task, task.build_model())).run({"x": x})
    assert {name: values.tolist() for name, values in given_back.items()} == {
        "same": [[1, 2]],
        "again": [[1, 2]],
        "sum": [[2, 4]],
        "twice": [[2, 4]],
    }


def test_other_axes_may_vary_too() -> None:
    wave = Tensor(name="wave", dtype="FP32", shape=(-1, -1))
    task = made(lambda wave: wave.mean(dim=1), inputs=(wave,))
    servable = Servable(export(task, task.build_model()))
    for rows, length in ((1, 1), (3, 50)):
        assert servable.run({"wave": np.ones((rows, length), np.float32)})["value"].tolist() == [1.0] * rows


class _Restless(torch.nn.Module):
    """Gives something else at each call, as a forgotten random number would."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x.sum(dim=1) + self.calls


def test_a_graph_unlike_its_model_is_not_handed_out() -> None:
    task = made(None)
    with pytest.raises(TandemError) as caught:
        export(task, _Restless())
    assert "another 'value' than the model" in caught.value.failed
    assert "relative difference of" in caught.value.got


def branching(x: torch.Tensor) -> torch.Tensor:
    return x.sum(dim=1) if x.sum() > 0 else x.prod(dim=1)


@pytest.mark.parametrize(
    ("task", "part"),
    [
        (made(branching), "can't be exported"),
        (made(lambda x: x.reshape(3, 2).sum(dim=1)), "can't be exported"),
        (made(lambda x: (x[:, 0], x[:, 1])), "outputs are not those of the signature"),
        (made(lambda x: x), "'value' is not what the signature says"),
        (made(lambda x: x.sum(dim=1).double()), "'value' is not what the signature says"),
        (made(lambda x: x.sum(dim=1), words={"x": ("a",)}), "input 'x' can't be put into a graph"),
        (made(lambda x: x, Tensor(name="label", dtype="BYTES", shape=(-1,))), "output 'label' can't"),
    ],
    ids=["branch", "fixed batch", "outputs", "shape", "dtype", "vocabulary", "label"],
)
def test_what_no_graph_can_hold_is_refused(task: Made, part: str) -> None:
    with pytest.raises(TandemError) as caught:
        export(task, task.build_model())
    assert part in caught.value.failed
    assert all((caught.value.got, caught.value.allowed, caught.value.fix))


def test_a_model_beyond_one_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.export, "MAX_GRAPH_BYTES", 1000)
    task = of_image()
    with pytest.raises(BadInput, match="too large for one ONNX file"):
        export(task, task.build_model())


def test_export_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    task = made(lambda x: x.sum(dim=1))
    export(task, task.build_model())
    assert capfd.readouterr() == ("", "")


CLASSES = Signature(
    task="t",
    inputs=(X,),
    outputs=(
        Tensor(name="label", dtype="BYTES", shape=(-1,)),
        Tensor(name="probabilities", dtype="FP32", shape=(-1, 2)),
    ),
    labels=("no", "yes"),
)


def test_labels_must_agree_with_probabilities() -> None:
    chances = np.array([[0.9, 0.1]], np.float32)
    check_parity(CLASSES, [chances], {"label": np.array(["no"], object), "probabilities": chances}, 1)
    with pytest.raises(TandemError, match="another 'label'"):
        check_parity(CLASSES, [chances], {"label": np.array(["yes"], object), "probabilities": chances}, 1)


@pytest.mark.parametrize(
    ("expected", "given_back", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.0, 200.0], [0.1, 200.0], 0.0005),
        ([np.nan, 1.0], [np.nan, 1.0], 0.0),
        ([np.inf, 1.0], [np.inf, 1.0], 0.0),
        ([np.nan], [1.0], np.inf),
        ([np.inf], [1.0], np.inf),
        ([0.0], [0.5], 0.5),
    ],
)
def test_differences_are_relative_to_the_largest_value(
    expected: list[float], given_back: list[float], difference: float
) -> None:
    assert relative_difference(np.array(expected), np.array(given_back)) == pytest.approx(difference)
