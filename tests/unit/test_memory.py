"""What a worker finds when nobody holds the state any more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from recording_task import Options, RecordingTask

from cluster.errors import Damaged
from cluster.events import EventWriter, read_events
from cluster.manifest import Writer
from cluster.runs import Run
from cluster.storage import memory_store
from training.descent import Weights
from training.facts import ColumnFacts, DatasetFacts
from training.group import Group
from training.loop import TrainState
from training.memory import Memory
from training.recipe import Recipe

FACTS = DatasetFacts(
    fingerprint="f",
    rows=320,
    columns={name: ColumnFacts(kind="number") for name in ("id", "x", "y")},
    label="y",
)
ALONE = Group(0, 1, 1, "a", None)


@pytest.fixture
def memory(tmp_path: Path) -> tuple[Memory[TrainState], Run, EventWriter]:
    run = Run(memory_store(), "r")
    recipe = Recipe.model_validate(
        {"model": "m", "task": "a:B", "data": {"train": "t", "eval": "e"}, "store": str(tmp_path)}
    )
    task = RecordingTask(FACTS, Options(log_dir=str(tmp_path)))
    cpu = torch.device("cpu")
    held = Memory(run, recipe.strategy, "f", Weights(task, recipe.optimization, cpu), cpu)
    return held, run, EventWriter(run.store, run.prefix, "w")


def test_a_log_of_fences_is_a_beginning(memory: tuple[Memory[TrainState], Run, EventWriter]) -> None:
    held, run, events = memory
    run.checkpoints().fence(Writer(epoch=1, generation=0))
    assert held.agree(ALONE, events) == "fresh"
    assert (held.state.step, held.head) == (0, 1)


def test_no_readable_manifest_is_no_beginning(memory: tuple[Memory[TrainState], Run, EventWriter]) -> None:
    """Training from step 0 again, over checkpoints that exist, is the user's decision."""
    held, run, events = memory
    artifacts = run.checkpoints()
    artifacts.commit(1, {"a": b"a"}, {})
    key = artifacts.key(1)
    run.store.put(key, run.store.get(key).replace(b"checkpoint", b"chequepoint"))
    with pytest.raises(Damaged, match="no checkpoint of the run is whole"):
        held.agree(ALONE, events)


def test_what_is_newer_in_the_store_but_damaged_does_not_cost_the_memory(
    memory: tuple[Memory[TrainState], Run, EventWriter],
) -> None:
    held, run, events = memory
    held.agree(ALONE, events)
    held.state.step, held.state.cursor = 5, 40
    held.keep(held.line(ALONE), events)
    run.checkpoints().commit(1, {"a": b"a"}, {"step": 9})
    assert held.agree(Group(0, 1, 7, "b", None), events) == "memory"
    assert (held.state.step, held.state.cursor) == (5, 40)
    events.flush()
    assert [e["event"] for e in read_events(run.store, run.prefix)] == ["checkpoint-passed-over"]


def test_a_ruined_state_is_let_go(memory: tuple[Memory[TrainState], Run, EventWriter]) -> None:
    held, _, events = memory
    held.agree(ALONE, events)
    held.state.step, held.state.sound = 5, False
    held.keep(held.line(ALONE), events)
    assert held.agree(Group(0, 1, 2, "b", None), events) == "fresh"
    assert (held.state.step, held.state.sound) == (0, True)
