"""Training processes that outlive their group: a peer dies, is stopped, comes late, or is sent away."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from members import Company, wait_until
from recording_task import write_line

from cluster.clock import SYSTEM_CLOCK
from cluster.events import read_events
from cluster.runs import Run
from cluster.storage import open_store
from training.checkpoints.checkpoint import load_checkpoint
from training.crew.messages import Ended, Failed, Joined, Part, Parted, Pause, Paused
from training.facts import DatasetFacts
from training.loop import new_state
from training.recipe import Recipe
from training.run import prepare
from training.tasks import build_task

ROWS = 240


def started(folder: Path, name: str, poison: int | None = None, **changes: object) -> tuple[Recipe, Run]:
    (folder / "log").mkdir(exist_ok=True)
    recipe = Recipe.model_validate(
        {
            "model": "line",
            "task": "recording_task:RecordingTask",
            "options": {"log_dir": str(folder / "log"), "step_s": 0.02},
            "data": {
                "train": write_line(folder / "train", ROWS, poison=poison),
                "eval": write_line(folder / "eval", 10),
                "label": "y",
            },
            "store": str(folder / "store"),
            "run": name,
            "optimization": {"global_batch_size": 8, "epochs": 2, "learning_rate": 0.03},
            "checkpoint": {"every_s": None, "every_steps": 7},
        }
        | changes
    )
    run = Run(open_store(recipe.store), name)
    prepare(run, recipe, SYSTEM_CLOCK)
    return recipe, run


@pytest.fixture
def company(tmp_path: Path) -> Iterator[Company]:
    recipe, run = started(tmp_path, "r")
    with Company(recipe, run.record().facts) as company:
        yield company


def final_weights(recipe: Recipe, run: Run) -> dict[str, torch.Tensor]:
    facts = DatasetFacts.model_validate(run.record().facts)
    task = build_task(recipe.task, facts, recipe.options)
    state = new_state(task, recipe.optimization, torch.device("cpu"))
    artifacts = run.checkpoints()
    meta = load_checkpoint(state, artifacts, artifacts.read(artifacts.head()))
    assert meta.cursor == 2 * ROWS
    assert [(s.start, s.stop) for s in meta.ledger][-1][1] == 2 * ROWS
    return dict(state.model.state_dict())


def test_survivors_go_on_from_memory_bit_for_bit(tmp_path: Path) -> None:
    """A killed peer, a stopped one, a new one: the model is the one that nothing had happened to."""
    recipe, run = started(tmp_path, "faulty")
    with Company(recipe, run.record().facts) as company:
        members = company.members
        company.hire("a", "b", "c")
        company.form("a", "b")
        assert members["a"].hear(Joined).source == "fresh"
        wait_until(lambda: members["a"].step >= 10)
        members["b"].kill()
        parted = members["a"].hear(Parted)
        company.form("c", "a")  # the survivor under another rank
        joined = members["c"].hear(Joined)
        assert (joined.source, joined.step) == ("memory", parted.step)
        wait_until(lambda: members["c"].step >= parted.step + 10)

        members["a"].kill(signal.SIGSTOP)  # closes no connection: the other one waits in its exchange
        members["c"].order(Part(generation=2))
        parted = members["c"].hear(Parted)
        members["a"].kill()
        company.hire("d")
        company.form("c", "d")
        assert members["d"].hear(Joined).step == parted.step
        for name in ("c", "d"):
            members[name].hear(Ended)
    smooth_recipe, smooth = started(tmp_path, "smooth")
    with Company(smooth_recipe, smooth.record().facts) as company:
        company.hire("a", "b")
        company.form("a", "b")
        company.members["a"].hear(Ended)
        company.members["b"].hear(Ended)
    assert_same(final_weights(recipe, run), final_weights(smooth_recipe, smooth))


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_pause_is_at_a_step_boundary_and_loses_nothing(company: Company) -> None:
    members = company.members
    company.hire("a", "b", "c")
    company.form("a", "b", "c")
    wait_until(lambda: members["a"].step >= 5)
    members["a"].order(Pause(generation=1, save=True))
    paused = [members[name].hear(Paused) for name in "abc"]
    assert len({(p.step, p.saved) for p in paused}) == 1
    assert paused[0].saved
    assert company.dismiss("b") == 0
    company.form("c", "a")
    joined = members["a"].hear(Joined)
    assert (joined.source, joined.step) == ("memory", paused[0].step)
    for name in "ac":
        members[name].hear(Ended)


def test_a_batch_that_ruins_the_weights_is_left_out_once_and_recorded(tmp_path: Path) -> None:
    recipe, run = started(tmp_path, "poisoned", poison=100)
    with Company(recipe, run.record().facts) as company:
        company.hire("a", "b")
        company.form("a", "b")
        for name in "ab":
            company.members[name].hear(Ended)
    weights = final_weights(recipe, run)
    assert all(bool(tensor.isfinite().all()) for tensor in weights.values())
    happened = [event["event"] for event in read_events(run.store, run.prefix)]
    assert happened.count("rolled-back") == 2  # once an epoch
    assert happened.count("batch-skipped") >= 2


def test_too_many_ruinous_batches_end_the_run_clearly(tmp_path: Path) -> None:
    recipe, run = started(tmp_path, "hopeless", poison=100, faults={"skip_at_most": 1})
    with Company(recipe, run.record().facts) as company:
        company.hire("a")
        company.form("a")
        failed = company.members["a"].hear(Failed)
    assert not failed.retryable
    assert failed.error["allowed"] == "faults.skip_at_most: 1"
