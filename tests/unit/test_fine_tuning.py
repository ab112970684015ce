"""Beginning with a version's weights: what is taken, what is left out, what stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cluster.clock import SYSTEM_CLOCK
from cluster.errors import BadInput, NotFound
from cluster.runs import Run
from cluster.storage import open_store
from training.checkpoints.checkpoint import restore_model
from training.checks import prepare, settled
from training.facts import DatasetFacts
from training.finish import finish_run
from training.progress import Progress
from training.recipe import Recipe
from training.task import Task
from training.tasks import build_task
from training.worker import run_worker


def write_table(folder: Path, classes: str, words: str) -> str:
    rng = np.random.default_rng(1)
    x, place = rng.normal(size=96), rng.integers(0, len(words), 96)
    label = [classes[n] for n in (x > 0).astype(int) + (len(classes) > 2) * (place == 0)]
    folder.mkdir(parents=True)
    table = pa.table({"x": x, "word": [words[n] for n in place], "label": label})
    pq.write_table(table, folder / "a.parquet", row_group_size=32)
    return str(folder)


def recipe(folder: Path, run: str, data: str = "ab-uvw", **changes: Any) -> Recipe:
    classes, _, words = data.partition("-")
    place = folder / data
    table = str(place) if place.exists() else write_table(place, classes, words)
    return Recipe.model_validate(
        {
            "model": "m",
            "task": "tabular-classification",
            "options": {"width": 8, "depth": 1},
            "data": {"train": table, "eval": table},
            "store": str(folder / "store"),
            "run": run,
            "optimization": {"global_batch_size": 32, "epochs": 2, "learning_rate": 0.01},
            "promote_to": "live",
        }
        | changes
    )


def silent(_: Progress) -> None: ...


def trained(wanted: Recipe, *, register: bool = False) -> dict[str, torch.Tensor]:
    """Train to the end, perhaps make a version of it, and give its weights."""
    assert wanted.run is not None
    run = Run(open_store(wanted.store), wanted.run)
    facts = prepare(run, wanted, SYSTEM_CLOCK.wall())
    run_worker(settled(wanted, run.record()), wanted.run, facts, report=silent)
    if register:
        finish_run(wanted, wanted.run, samples_per_s=1.0, show=silent)
    return weights(wanted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a store in which `m@1` is what run `first` has made. Each test's runs have names of their own."""
    folder = tmp_path_factory.mktemp("tuning")
    trained(recipe(folder, "first"), register=True)
    return folder


def weights(wanted: Recipe) -> dict[str, torch.Tensor]:
    assert wanted.run is not None
    run = Run(open_store(wanted.store), wanted.run)
    facts = DatasetFacts.model_validate(run.record().facts)
    model = cast(Task, build_task(wanted.task, facts, wanted.options)).build_model()
    restore_model(model, run.checkpoints(), lambda number, error: None)
    return model.state_dict()


def test_what_is_frozen_stays_and_the_rest_moves(folder: Path) -> None:
    first = weights(recipe(folder, "first"))
    origin = {"version": "m@1", "freeze": ["stem.*", "embeddings.*"]}
    second = trained(recipe(folder, "frozen", initialize_from=origin))
    for name, value in second.items():
        assert torch.equal(value, first[name]) == name.startswith(("stem.", "embeddings.")), name


def test_an_alias_is_what_it_was_when_the_run_began(folder: Path) -> None:
    tuned = recipe(folder, "alias", initialize_from="m@live")
    trained(tuned, register=True)  # which is promoted: the alias points elsewhere now
    record = Run(open_store(tuned.store), "alias").record()
    assert record.recipe["initialize_from"]["version"] == "m@1"
    prepare(Run(open_store(tuned.store), "alias"), tuned, SYSTEM_CLOCK.wall())
    other = recipe(folder, "alias", initialize_from="m@2")
    with pytest.raises(BadInput, match="another 'initialize_from'"):
        prepare(Run(open_store(tuned.store), "alias"), other, SYSTEM_CLOCK.wall())


def test_tuning_begins_where_the_version_ended(folder: Path) -> None:
    """With next to no learning, the weights are the version's."""
    first = weights(recipe(folder, "first"))
    still = {"global_batch_size": 96, "learning_rate": 1e-12, "weight_decay": 0}
    second = trained(recipe(folder, "still", initialize_from="m@1", optimization=still))
    for name, value in second.items():
        torch.testing.assert_close(value, first[name], rtol=0, atol=1e-9)


def test_other_classes_and_words(folder: Path) -> None:
    first = weights(recipe(folder, "first"))
    for data, said in (("xy-uvw", "other classes"), ("ab-uvz", "other words"), ("abc-uvw", "other classes")):
        with pytest.raises(BadInput, match="doesn't fit this data") as caught:
            trained(recipe(folder, "r", data, initialize_from="m@1"))
        assert caught.value.got.startswith(said)
    origin = {"version": "m@1", "leave_out": ["head.*"], "freeze": ["stem.weight"]}
    third = trained(recipe(folder, "third", "abc-uvw", initialize_from=origin))
    assert torch.equal(third["stem.weight"], first["stem.weight"])
    assert third["head.weight"].shape[0] == 3


@pytest.mark.parametrize(
    ("origin", "changes", "said"),
    [
        ({"version": "m@1", "freeze": ["nothing.*"]}, {}, "freeze fits nothing"),
        ({"version": "m@1", "leave_out": ["nothing.*"]}, {}, "leave_out fits nothing"),
        ({"version": "m@1", "freeze": ["*"]}, {}, "every parameter is frozen"),
        ("m@1", {"options": {"width": 16, "depth": 1}}, "can't be taken from the version"),
        ("m@1", {"task": "boosted-trees", "options": {}, "optimization": {}}, "says nothing"),
    ],
)
def test_what_does_not_suit(folder: Path, origin: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        trained(recipe(folder, f"unsuited-{len(said)}", initialize_from=origin, **changes))


def test_no_such_version(folder: Path) -> None:
    with pytest.raises(NotFound):
        trained(recipe(folder, "r", initialize_from="nobody@live"))
    with pytest.raises(ValueError, match="initialize_from"):
        recipe(folder, "r", initialize_from="../x@live")
