"""Boosted trees: what is refused, what a graph says beside its booster, and going on where a run was."""

from __future__ import annotations

import gc
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xgboost as xgb
from protocol_models import refused
from task_facts import PRICE, TABLE, facts

from cluster.clock import SYSTEM_CLOCK
from cluster.errors import BadInput, Damaged
from cluster.runs import Run
from cluster.storage import open_store
from serving.protocol.codec import Codec
from serving.runtimes.onnx import OnnxRuntime
from training.checks import prepare
from training.control import Control
from training.data.audit import audit
from training.data.columns import input_arrays
from training.data.dataset import Dataset
from training.data.samples import write_breast_cancer, write_diamonds
from training.facts import ColumnFacts, DatasetFacts
from training.finish import finish_run
from training.group import Group
from training.progress import Progress
from training.recipe import Recipe
from training.recorder import Recorder
from training.servable import GRAPH_FILE, Servable
from training.tasks import build_task
from training.tasks.trees import BoostedTrees
from training.trees.export import export_booster, predicted
from training.trees.forest import read_forest
from training.trees.grown import read_booster
from training.trees.method import parameters
from training.trees.scratch import Scratch
from training.trees.share import is_held_back, read_share
from training.worker import Worker, run_worker

ANIMALS = ColumnFacts(kind="category", categories=("cat", "dog", "owl"))
AWKWARD = {  # names that a graph might well use itself
    "value ": ColumnFacts(kind="number", mean=0.0, std=1.0),
    "v0": ColumnFacts(kind="category", categories=tuple(f"w{n:02}" for n in range(70))),
    "margins": ColumnFacts(kind="number", mean=0.0, std=1.0),
}


def trees(columns: dict[str, ColumnFacts], label: ColumnFacts, **options: Any) -> BoostedTrees:
    task = build_task("boosted-trees", facts(columns, label), options)
    assert isinstance(task, BoostedTrees)
    return task


def boosted(task: BoostedTrees, rounds: int, rows: int = 2000) -> xgb.Booster:
    """Trees on examples whose label depends on every column, missing or not."""
    rng = np.random.default_rng(5)
    arrays = task.example_inputs(rows, rng)
    score = rng.normal(0, 0.1, rows)
    features = []
    for name in task.input_names:
        values = arrays[name]
        if values.dtype == object:
            words = task.vocabularies()[name]
            codes = np.array([words.index(word) if word in words else np.nan for word in values])
            score += np.nan_to_num(codes % 3, nan=1.5)
            features.append(codes)
        else:
            spread = np.nanstd(values) or 1.0
            score += np.nan_to_num((values - np.nanmean(values)) / spread, nan=-1.0)
            features.append(values)
    classes = len(task.facts.labels)
    cuts = np.quantile(score, np.arange(1, classes) / max(1, classes))
    label = np.digitize(score, cuts) if classes else score * 700 + 5e4
    kinds = ["q" if c.kind == "number" else "c" for c in task.columns.values()]
    matrix = xgb.QuantileDMatrix(np.stack(features, 1).astype(np.float32), label, feature_types=kinds)
    return xgb.train(parameters(task, 1, 0), matrix, rounds)


@pytest.mark.parametrize("columns", [TABLE, AWKWARD], ids=["table", "awkward names"])
@pytest.mark.parametrize(
    "label",
    [ColumnFacts(kind="category", categories=("no", "yes")), ANIMALS, PRICE],
    ids=["two", "three", "price"],
)
def test_the_graph_says_what_the_booster_says(columns: dict[str, ColumnFacts], label: ColumnFacts) -> None:
    """Missing numbers, missing and unseen words, sets of categories, rows that are at a threshold exactly."""
    task = trees(columns, label, depth=4)
    booster = boosted(task, 12)
    files = export_booster(task, booster, None)  # compares rows at thresholds
    arrays = task.example_inputs(500, np.random.default_rng(9))
    answers = Servable(files).run(arrays)
    expected = predicted(task, booster, arrays)
    if label.kind == "number":
        np.testing.assert_allclose(answers["value"], expected, rtol=1e-6)
    else:
        np.testing.assert_allclose(answers["probabilities"], expected, atol=1e-6)
        assert set(answers["label"]) <= set(label.categories or ())
    assert files == export_booster(task, booster, None), "the same trees give the same bytes"
    modes = next(
        n for n in onnx.load_from_string(files[GRAPH_FILE]).graph.node if n.op_type == "TreeEnsemble"
    )
    assert b"\6" in next(a for a in modes.attribute if a.name == "nodes_modes").t.raw_data, "a set was used"


def test_a_graph_of_the_best_rounds() -> None:
    task = trees(TABLE, ANIMALS, depth=3)
    booster = boosted(task, 9)
    assert len(read_forest(bytes(booster.save_raw("json")), 4).trees) == 4 * 3
    arrays = task.example_inputs(50, np.random.default_rng(1))
    answers = Servable(export_booster(task, booster, 4)).run(arrays)
    np.testing.assert_allclose(answers["probabilities"], predicted(task, booster, arrays, 4), atol=1e-6)


def test_trees_without_a_split() -> None:
    """Nothing to be gained by splitting: each tree is a leaf."""
    task = trees(TABLE, PRICE, min_split_loss=1e12)
    booster = boosted(task, 3)
    value = Servable(export_booster(task, booster, None)).run(
        task.example_inputs(4, np.random.default_rng(0))
    )["value"]
    assert len(set(value.tolist())) == 1


@pytest.mark.parametrize(
    ("label", "options", "classifies"),
    [
        (ANIMALS, {}, True),
        (PRICE, {}, False),
        (ColumnFacts(kind="category", categories=("1", "2"), mean=1.5, std=0.5), {}, True),
        (
            ColumnFacts(kind="category", categories=("1", "2"), mean=1.5, std=0.5),
            {"objective": "regression"},
            False,
        ),
    ],
)
def test_the_label_decides(label: ColumnFacts, options: dict[str, Any], classifies: bool) -> None:
    task = trees(TABLE, label, **options)
    assert task.classifies == classifies
    assert ("accuracy" in task.greater_is_better) == classifies
    network = "tabular-classification" if classifies else "tabular-regression"
    other = build_task(network, facts(TABLE, label), {})
    assert task.signature().model_copy(update={"task": ""}) == other.signature().model_copy(
        update={"task": ""}
    )


@pytest.mark.parametrize(
    ("label", "options", "said"),
    [
        (ANIMALS, {"objective": "regression"}, "can't be learnt"),
        (PRICE, {"objective": "classification"}, "can't be learnt"),
        (PRICE, {"exclude": ["nothing"]}, "exclude"),
        (PRICE, {"depth": 0}, "depth"),
        (PRICE, {"subsample": 0.5}, "subsample"),
    ],
)
def test_what_trees_cannot_learn(label: ColumnFacts, options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        trees(TABLE, label, **options)


def write_table(folder: Path, rows: int, seed: int) -> str:
    """x, words (any of them missing) and y, in row groups of 64."""
    rng = np.random.default_rng(seed)
    x, place = rng.normal(size=rows), rng.integers(0, 6, rows)
    words = [None if n == 5 else f"w{n}" for n in place]
    missing = rng.random(rows) < 0.1
    y = np.where(missing, 0, x) + place % 2 + rng.normal(0, 0.05, rows)
    table = pa.table({"x": pa.array(x, mask=missing), "words": words, "y": y})
    folder.mkdir()
    pq.write_table(table, folder / "a.parquet", row_group_size=64)
    return str(folder)


def started(folder: Path, name: str, **changes: Any) -> tuple[Recipe, Run, DatasetFacts]:
    if not (folder / "train").exists():
        write_table(folder / "train", 600, 1)
        write_table(folder / "eval", 200, 2)
    recipe = Recipe.model_validate(
        {
            "model": "m",
            "task": "boosted-trees",
            "options": {"rounds": 24, "depth": 3, "eta": 0.3},
            "data": {"train": str(folder / "train"), "eval": str(folder / "eval"), "label": "y"},
            "store": str(folder / "store"),
            "run": name,
            "checkpoint": {"every_s": None, "every_steps": 7},
            "gate": {"metric": "r2", "at_least": 0.9},
        }
        | changes
    )
    run = Run(open_store(recipe.store), name)
    return recipe, run, prepare(run, recipe, SYSTEM_CLOCK.wall())


def silent(_: Progress) -> None: ...


def last_booster(run: Run) -> bytearray:
    artifacts = run.checkpoints()
    manifest = artifacts.last()
    assert manifest is not None
    return read_booster(artifacts, manifest)


def test_a_run_becomes_a_version(tmp_path: Path) -> None:
    recipe, run, found = started(tmp_path, "r")
    outcome = run_worker(recipe, "r", found, report=silent)
    assert outcome.steps == 24
    result = finish_run(recipe, "r", samples_per_s=1.0, show=silent)
    assert (result.gate, result.version) == ("passed", 1)
    report = audit(run)
    assert not report.problems
    assert {(e.due_rows, e.missing_rows, e.repeated_rows) for e in report.epochs} == {(600, 0, 0)}
    assert len(report.epochs) == 24, "every round sees every row"


class _Killed(BaseException): ...


@pytest.mark.parametrize("stopping", [None, {"rounds": 50, "share": 0.2}], ids=["plain", "watching"])
def test_a_resumed_run_has_the_same_trees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopping: dict[str, Any] | None
) -> None:
    options = {"rounds": 24, "depth": 3, "early_stopping": stopping}
    recipe, smooth, found = started(tmp_path, "smooth", options=options)
    run_worker(recipe, "smooth", found, report=silent)
    recipe, broken, found = started(tmp_path, "broken", options=options)
    on_step = Recorder.on_step

    def killed(self: Recorder, step: Any) -> None:
        on_step(self, step)
        if step.step == 16:
            self._saver.wait(60)
            raise _Killed

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "on_step", killed)
        with pytest.raises(_Killed):
            run_worker(recipe, "broken", found, report=silent)
    newest = broken.checkpoints().last()
    assert newest is not None
    assert 7 <= newest.meta["step"] < 16
    run_worker(recipe, "broken", found, report=silent)
    assert last_booster(broken) == last_booster(smooth)
    assert not audit(broken).problems


def test_a_worker_goes_on_from_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation that breaks leaves the trees of its last whole round."""
    recipe, run, found = started(tmp_path, "r", checkpoint={"every_s": 3600})
    worker = Worker(recipe, "r", found, report=silent)
    on_step = Recorder.on_step

    def lost(self: Recorder, step: Any) -> None:
        on_step(self, step)
        if step.step == 10:
            raise ConnectionError

    with monkeypatch.context() as patched:
        patched.setattr(Recorder, "on_step", lost)
        with pytest.raises(ConnectionError):
            worker.train(Group(0, 1, 1, "a", None), Control())
    sources = []
    control = Control(on_joined=lambda step, source: sources.append((step, source)))
    assert worker.train(Group(0, 1, 2, "b", None), control).steps == 24
    worker.close()
    assert sources == [(10, "memory")]
    recipe, smooth, found = started(tmp_path, "smooth")
    run_worker(recipe, "smooth", found, report=silent)
    assert last_booster(run) == last_booster(smooth)


def test_a_damaged_booster_is_passed_over(tmp_path: Path) -> None:
    recipe, run, found = started(tmp_path, "r")
    run_worker(recipe, "r", found, report=silent)
    artifacts = run.checkpoints()
    head = artifacts.read(artifacts.head())
    whole = last_booster(run)
    with pytest.raises(Damaged, match="trees of its step"):
        read_booster(artifacts, head.model_copy(update={"meta": {**head.meta, "step": 3}}))
    run.store.put(head.files["booster.ubj"].key, bytes(whole[:-9]))
    run_worker(recipe, "r", found, report=silent)
    assert last_booster(run) == whole, "grown again from the checkpoint before"


def test_early_stopping_ends_a_run_and_chooses_its_best_round(tmp_path: Path) -> None:
    options = {"rounds": 2000, "eta": 0.5, "early_stopping": {"rounds": 5, "share": 0.2}}
    recipe, run, found = started(tmp_path, "r", options=options)
    outcome = run_worker(recipe, "r", found, report=silent)
    assert 5 < outcome.steps < 300
    assert run_worker(recipe, "r", found, report=silent).steps == outcome.steps, "it has ended"
    assert finish_run(recipe, "r", samples_per_s=1.0, show=silent).gate == "passed"
    version = run.servables().last()
    assert version is not None
    graph = onnx.load_from_string(run.servables().read_file(version, GRAPH_FILE))
    ensemble = next(node for node in graph.graph.node if node.op_type == "TreeEnsemble")
    roots = next(a for a in ensemble.attribute if a.name == "tree_roots").ints
    assert len(roots) == outcome.steps - 5


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shares_are_disjoint_and_whole(tmp_path: Path, world: int) -> None:
    data = Dataset.open(write_table(tmp_path / "t", 200, 1))
    task = build_task("boosted-trees", data.facts("y"), {"early_stopping": {"share": 0.3}})
    assert isinstance(task, BoostedTrees)
    labels: dict[str, list[float]] = {"train": [], "held_back": []}
    for rank in range(world):
        share = read_share(data, task, rank=rank, world=world, seed=4, threads=1)
        labels["train"] += share.train.get_label().tolist()
        assert share.held_back is not None
        labels["held_back"] += share.held_back.get_label().tolist()
    row_ids = np.arange(200)
    every = data.read_rows(row_ids, ["y"]).column("y").to_numpy().astype(np.float32)
    held = is_held_back(row_ids, 0.3, 4)
    assert 30 < held.sum() < 90
    assert labels["train"] == every[~held].tolist()
    assert labels["held_back"] == every[held].tolist()


def test_more_workers_than_rows(tmp_path: Path) -> None:
    data = Dataset.open(write_table(tmp_path / "t", 3, 1))
    task = build_task("boosted-trees", data.facts("y"), {})
    assert isinstance(task, BoostedTrees)
    assert read_share(data, task, rank=4, world=5, seed=0, threads=1).train.num_row() == 0


def test_a_share_on_disk_gives_the_same_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What doesn't fit a worker's memory is read from its disk every round."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    options = {"rounds": 8, "depth": 3, "early_stopping": {"share": 0.2}}
    recipe, small, found = started(tmp_path, "small", options=options)
    run_worker(recipe, "small", found, report=silent)
    large_options = {**options, "memory_gib": 1e-9}
    recipe, large, found = started(tmp_path, "large", options=large_options)
    run_worker(recipe, "large", found, report=silent)
    assert last_booster(large) == last_booster(small)
    gc.collect()
    dead = Scratch()
    dead._lock.close()  # as the end of its process does
    living = Scratch()
    assert not dead.path.exists()
    assert living.path.exists()
    living.remove_with(living)
    del living
    assert not list(tmp_path.glob("tandem-trees-*")), "its files are gone with it"


@pytest.mark.parametrize(
    "changes",
    [{"optimization": {"epochs": 3}}, {"optimization": {"learning_rate": 0.1}}, {"strategy": "fsdp"}],
    ids=["epochs", "learning_rate", "fsdp"],
)
def test_a_recipe_that_says_nothing_to_trees(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="says nothing to boosted trees"):
        started(tmp_path, "r", **changes)


def test_what_is_served_is_what_was_measured(tmp_path: Path) -> None:
    """JSON rows by column name, through serving's own reading and runtime, which know nothing of trees."""
    recipe, run, found = started(tmp_path, "r")
    run_worker(recipe, "r", found, report=silent)
    finish_run(recipe, "r", samples_per_s=1.0, show=silent)
    version = run.servables().last()
    assert version is not None
    files = {name: run.servables().read_file(version, name) for name in version.files}
    servable = Servable(files)
    data = Dataset.open(recipe.data.eval)
    measured = data.read_rows(np.arange(60), ["x", "words"])
    rows = [
        *measured.to_pylist(),
        {"x": 0.25},
        {"words": "w1"},
        {},
        {"x": None, "words": "never seen"},
    ]
    runtime, codec = (
        OnnxRuntime(files[GRAPH_FILE], servable.signature, threads=1),
        Codec(servable.signature, "m"),
    )
    request = codec.parse_predict(orjson.dumps({"instances": rows}), "application/json")
    answers = runtime.run(request.inputs)["value"]
    expected = servable.run(input_arrays(measured, servable.signature))["value"]
    np.testing.assert_allclose(answers[:60], expected, rtol=1e-6)
    assert answers[-1] == answers[-2], "a word that was never seen counts as missing"
    for row, status in (({"x": 1, "wrods": "w1"}, 422), ({"x": "much"}, 422), ({"words": 3}, 422)):
        body = orjson.dumps({"instances": [row]})
        assert refused(codec.parse_predict, body, "application/json").http_status == status
    runtime.close()


def gated(folder: Path, train: str, held_out: str, gate: dict[str, Any], **changes: Any) -> str:
    data = {"train": train, "eval": held_out}
    recipe = Recipe.model_validate(
        {"model": "m", "data": data, "store": str(folder / "store"), "run": "r", "gate": gate} | changes
    )
    found = prepare(Run(open_store(recipe.store), "r"), recipe, SYSTEM_CLOCK.wall())
    run_worker(recipe, "r", found, report=silent)
    return finish_run(recipe, "r", samples_per_s=1.0, show=silent).gate


def test_breast_cancer(tmp_path: Path) -> None:
    train, held_out = write_breast_cancer(str(tmp_path / "data"))
    gate = {"metric": "accuracy", "at_least": 0.95}
    assert gated(tmp_path, train, held_out, gate, task="boosted-trees") == "passed"


@pytest.mark.skipif(find_spec("plotnine") is None, reason="plotnine, with which the diamonds come, is absent")
@pytest.mark.parametrize(
    ("least", "changes"),
    [
        (0.97, {"task": "boosted-trees"}),
        (
            0.95,
            {
                "task": "tabular-regression",
                "optimization": {"epochs": 5, "learning_rate": 0.002, "warmup_steps": 50},
            },
        ),
    ],
    ids=["trees", "net"],
)
def test_diamonds(tmp_path: Path, least: float, changes: dict[str, Any]) -> None:
    train, held_out = write_diamonds(str(tmp_path / "data"))
    assert gated(tmp_path, train, held_out, {"metric": "r2", "at_least": least}, **changes) == "passed"
