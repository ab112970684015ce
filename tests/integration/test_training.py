"""Training through Ray Train: killed or lent, workers lose and repeat nothing; a gate may refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from paced_task import HURRY
from recording_task import consumed_along_committed_line, write_line

from cluster.errors import BadInput, RunFailed
from cluster.events import read_events
from cluster.local import LocalRay
from cluster.names import ModelRef
from cluster.registry import Registry
from cluster.runs import Run
from cluster.storage import open_store
from training.checkpoints.checkpoint import restore
from training.crew.lending import coordinator_name
from training.facts import DatasetFacts
from training.loop import new_state
from training.progress import Progress
from training.recipe import Recipe
from training.run import train
from training.tasks import build_task

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    with LocalRay.start(num_cpus=2, env={"PYTHONPATH": str(TESTS)}, purpose="tests") as local:
        yield local.address


def recipe(folder: Path, **changes: object) -> Recipe:
    (folder / "log").mkdir(exist_ok=True)
    fields: dict[str, object] = {
        "model": "line",
        "task": "recording_task:RecordingTask",
        "options": {"log_dir": str(folder / "log")},
        "data": {
            "train": write_line(folder / "train", 500),
            "eval": write_line(folder / "eval", 50),
            "label": "y",
        },
        "store": str(folder / "store"),
        "run": "the-run",
        "workers": {"min": 2, "max": 2},
        "optimization": {"global_batch_size": 64, "epochs": 4, "learning_rate": 0.03},
        "checkpoint": {"every_s": None, "every_steps": 3},
        "gate": {"metric": "mae", "at_most": 100},
        "promote_to": "live",
    }
    return Recipe.model_validate(fields | changes)


def ignore(_: Progress) -> None:
    pass


def when_stepping(folder: Path, steps: int, act: Callable[[list[int]], None]) -> threading.Thread:
    """Calls `act` with the pids of the training processes once one of them has made so many steps."""

    def watch() -> None:
        deadline_s = time.monotonic() + 90
        while time.monotonic() < deadline_s:
            made = {int(f.stem): len(f.read_text().splitlines()) for f in (folder / "log").glob("*.jsonl")}
            if any(n >= steps for n in made.values()):
                act(sorted(made))
                return
            time.sleep(0.02)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def final_bytes(run: Run, asked: Recipe) -> dict[str, bytes]:
    """Every tensor of the run's last checkpoint, the optimizer's included."""
    facts = DatasetFacts.model_validate(run.record().facts)
    task = build_task(asked.task, facts, asked.options)
    state = new_state(task, asked.optimization, torch.device("cpu"))
    found = restore(state, run.checkpoints(), lambda number, error: None)
    assert found is not None
    assert (found.number, found.meta.step) == (found.head, 4 * 8)
    tensors = dict(state.model.state_dict())
    for name, parameter in state.model.named_parameters():
        tensors |= {f"{name}/{key}": value for key, value in state.optimizer.state[parameter].items()}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.timeout(240)
def test_a_killed_worker_loses_and_repeats_nothing(ray_address: str, tmp_path: Path) -> None:
    asked = recipe(tmp_path, options={"log_dir": str(tmp_path / "log"), "step_s": 0.05})
    run = Run(open_store(asked.store), "the-run")
    killed: list[int] = []

    def kill(pids: list[int]) -> None:
        os.kill(pids[1], signal.SIGKILL)
        killed.append(pids[1])

    when_stepping(tmp_path, 11, kill)
    notes: list[str] = []
    result = train(asked, address=ray_address, show=lambda progress: notes.append(progress.note))

    events = list(read_events(run.store, run.prefix))
    assert killed, "the fault never happened"
    assert any("was lost (SIGKILL); going on from step" in note for note in notes)
    assert [e["source"] for e in events if e["event"] == "generation-started"] == ["fresh", "memory"]
    assert len([e for e in events if e["event"] == "attempt-started" and e["rank"] == 0]) == 2
    assert max(e["step"] for e in events if e["event"] == "attempt-started") > 0, "resumed from the start"
    steps = consumed_along_committed_line(events, tmp_path / "log")
    assert len(steps) == result.steps == 4 * 8
    for epoch in range(4):
        rows = [row for step in steps[epoch * 8 : epoch * 8 + 8] for row in step]
        assert sorted(rows) == list(range(500))
    assert steps[:8] != steps[8:16], "epochs are shuffled anew"

    newest = run.checkpoints().read(run.checkpoints().head())
    ledger = newest.meta["ledger"]
    assert [s["start"] for s in ledger] == [0] + [s["stop"] for s in ledger[:-1]]
    assert ledger[-1]["stop"] == 4 * 500
    assert len({s["attempt"] for s in ledger}) == 2
    assert Registry(run.store).resolve(ModelRef.parse("line@live")).version == 1

    left_alone = recipe(tmp_path, run="left-alone")
    train(left_alone, address=ray_address, show=ignore)
    assert final_bytes(run, asked) == final_bytes(Run(run.store, "left-alone"), left_alone)

    again = train(asked, address=ray_address, show=ignore)
    assert again == result
    other = asked.optimization.model_copy(update={"seed": 1})
    with pytest.raises(BadInput, match="another 'optimization'"):
        train(asked.model_copy(update={"optimization": other}), address=ray_address, show=ignore)


def runs(*arguments: str, address: str) -> str:
    """What `tandem runs …` answers, as a process of its own."""
    command = [str(Path(sys.executable).with_name("tandem")), "runs", *arguments, "--address", address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(180)
def test_workers_are_lent_and_come_back_and_no_step_is_lost(ray_address: str, tmp_path: Path) -> None:
    asked = recipe(
        tmp_path,
        task="paced_task:PacedTask",
        options={"log_dir": str(tmp_path / "log"), "pace_s": 0.3},
        workers={"min": 1, "max": 2},
        optimization={"global_batch_size": 64, "epochs": 34, "learning_rate": 0.03},
        checkpoint={"every_s": None, "every_steps": 50},
    )
    run = Run(open_store(asked.store), "the-run")
    told: list[dict[str, Any]] = []

    def come_back() -> bool:
        crew = ray.get_actor(coordinator_name("the-run", asked.store))
        return bool(ray.get(crew.status.remote(), timeout=30)["world"] == 2)

    def borrow(_: list[int]) -> None:
        try:
            told.append(json.loads(runs("lend", "the-run", "--for", "10m", "--json", address=ray_address)))
            told.append(json.loads(runs("status", "the-run", "--json", address=ray_address)))
            runs("lend", "the-run", "--back", address=ray_address)
            deadline_s = time.monotonic() + 60
            while not come_back() and time.monotonic() < deadline_s:
                time.sleep(0.1)
        finally:
            (tmp_path / "log" / HURRY).touch()

    borrower = when_stepping(tmp_path, 5, borrow)
    result = train(asked, address=ray_address, show=ignore)
    borrower.join(10)

    lent, stood = told
    assert lent["lent"] == 1
    assert (stood["lent"], stood["seats"], stood["store"]) == (1, 1, asked.store)
    events = list(read_events(run.store, run.prefix))
    assert [(e["from"], e["to"]) for e in events if e["event"] == "resize"] == [(2, 1), (1, 2)]
    assert [e["event"] for e in events if e["event"] in ("lent", "returned")] == ["lent", "returned"]
    assert not [e for e in events if e["event"] == "member-lost"]
    steps = consumed_along_committed_line(events, tmp_path / "log")
    assert len(steps) == result.steps == 34 * 8
    for epoch in range(34):
        rows = [row for step in steps[epoch * 8 : epoch * 8 + 8] for row in step]
        assert sorted(rows) == list(range(500))
    made = sum(len(file.read_text().splitlines()) for file in (tmp_path / "log").glob("*.jsonl"))
    alone = [e["step"] for e in events if e["event"] == "generation-started"]
    assert made == 2 * result.steps - (alone[2] - alone[1]), "no step was made twice"


@pytest.mark.timeout(120)
def test_a_refused_gate_registers_nothing(ray_address: str, tmp_path: Path) -> None:
    asked = recipe(
        tmp_path,
        workers={"min": 1, "max": 1},
        optimization={"global_batch_size": 250, "epochs": 1},
        gate={"metric": "mae", "at_most": 1e-9},
    )
    notes: list[str] = []
    result = train(asked, address=ray_address, show=lambda progress: notes.append(progress.note))
    assert (result.gate, result.version) == ("failed", None)
    assert any("gate refused" in note for note in notes)
    assert Registry(open_store(asked.store)).models() == []


@pytest.mark.timeout(120)
def test_a_loss_that_is_not_finite_ends_the_run_at_once(ray_address: str, tmp_path: Path) -> None:
    optimization = {"global_batch_size": 64, "epochs": 3, "learning_rate": 1e30}
    asked = recipe(tmp_path, workers={"min": 1, "max": 1}, optimization=optimization)
    with pytest.raises(RunFailed, match="not a finite number"):
        train(asked, address=ray_address, show=ignore)


@pytest.mark.timeout(120)
def test_a_mistake_in_a_task_is_told_and_not_tried_again(ray_address: str, tmp_path: Path) -> None:
    options = {"log_dir": str(tmp_path / "log"), "faulty": True}
    asked = recipe(tmp_path, options=options)
    with pytest.raises(RunFailed, match="failed in the task's own code") as caught:
        train(asked, address=ray_address, show=ignore)
    assert "TypeError" in caught.value.got
    assert "recording_task.py" in caught.value.got
