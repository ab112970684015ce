"""Training processes that outlive their group: a peer dies, is stopped, comes late, or is sent away."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from members import Company, wait_until
from recording_task import consumed_along_committed_line, write_line

from cluster.clock import SYSTEM_CLOCK
from cluster.events import read_events
from cluster.runs import Run
from cluster.storage import open_store
from training.checkpoints.checkpoint import load_checkpoint
from training.checks import prepare
from training.crew.messages import Ended, Failed, Joined, Part, Parted, Pause, Paused
from training.data.audit import audit
from training.data.dataset import Dataset
from training.facts import DatasetFacts
from training.loop import new_state
from training.recipe import Recipe
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
    prepare(run, recipe, SYSTEM_CLOCK.wall())
    return recipe, run


@pytest.fixture
def company(tmp_path: Path) -> Iterator[Company]:
    recipe, run = started(tmp_path, "r")
    with Company(recipe, run.record().facts) as company:
        yield company


def audited_rows(run: Run, log_dir: Path, skipped: int = 0) -> list[list[int]]:
    """The rows of every committed step, after a look at the run's ledger."""
    found = audit(run)
    assert not found.problems
    assert sum(each.rows for each in found.skipped) == skipped
    return consumed_along_committed_line(list(read_events(run.store, run.prefix)), log_dir)


def saved_step(run: Run) -> int:
    newest = run.checkpoints().last()
    return newest.meta["step"] if newest else 0


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


def test_a_ruined_state_is_not_handed_on_and_the_right_batch_is_blamed(tmp_path: Path) -> None:
    """The peer dies before anybody has judged the step that ruined the weights of both."""
    plan = Dataset.open(write_line(tmp_path / "train", ROWS)).plan(0)
    recipe, run = started(
        tmp_path,
        "deadly",
        options={"log_dir": str(tmp_path / "log"), "deadly_row": int(plan.row_ids(0, 87, 88)[0])},
        optimization={"global_batch_size": 8, "epochs": 1, "learning_rate": 0.03, "seed": 0},
        checkpoint={"every_s": None, "every_steps": 5},
    )
    with Company(recipe, run.record().facts) as company:
        members = company.members
        company.hire("a", "b", "c")
        company.form("a", "b")
        parted = members["a"].hear(Parted)
        assert parted.step == 12
        company.form("a", "c")
        assert members["c"].hear(Joined).step <= 10
        for name in "ac":
            members[name].hear(Ended)
    events = list(read_events(run.store, run.prefix))
    assert [e["rows"] for e in events if e["event"] == "rolled-back"] == [[80, 88]]
    assert [e["step"] for e in events if e["event"] == "state-let-go"] == [12]
    left_out = audit(run).skipped
    assert [(each.position, each.rows) for each in left_out] == [(80, 8)]


def test_a_checkpoint_wins_over_the_older_state_of_one_who_was_away(tmp_path: Path) -> None:
    recipe, run = started(tmp_path, "away")
    with Company(recipe, run.record().facts) as company:
        members = company.members
        company.hire("a", "b", "c", "d")
        company.form("a", "b", "c")
        wait_until(lambda: members["a"].step >= 5)
        members["a"].order(Pause(generation=1, save=False))
        steps = [members[name].hear(Paused).step for name in "abc"]
        company.form("a", "b")
        wait_until(lambda: saved_step(run) > steps[0])
        for name in "ab":
            members[name].kill()
        company.form("c", "d")
        joined = members["d"].hear(Joined)
        assert (joined.source, joined.step) == ("store", saved_step(run))
        for name in "cd":
            members[name].hear(Ended)
    assert not audit(run).problems
    final_weights(recipe, run)


def test_a_sharded_run_loses_a_rank_shrinks_and_grows(tmp_path: Path) -> None:
    recipe, run = started(tmp_path, "sharded", strategy="fsdp")
    with Company(recipe, run.record().facts) as company:
        members = company.members
        company.hire("a", "b", "c")
        company.form("a", "b")
        wait_until(lambda: saved_step(run) > 0)
        members["b"].kill()
        members["a"].hear(Parted)
        company.form("c", "a")
        joined = members["a"].hear(Joined)
        assert (joined.source, joined.step) == ("store", saved_step(run))

        for generation, names in ((2, ["a"]), (3, ["a", "c"])):
            host = members["c" if generation == 2 else "a"]
            wait_until(lambda joined=joined, host=host: host.step >= joined.step + 3)  # type: ignore[misc]
            host.order(Pause(generation=generation, save=False))
            paused = members["a"].hear(Paused)
            assert paused.saved
            company.form(*names)
            joined = members["a"].hear(Joined)
            assert (joined.source, joined.step) == ("store", paused.step)
        for name in "ac":
            members[name].hear(Ended)
    steps = audited_rows(run, tmp_path / "log")
    for epoch in range(2):
        rows = [row for step in steps[epoch * 30 : epoch * 30 + 30] for row in step]
        assert sorted(rows) == list(range(ROWS))
