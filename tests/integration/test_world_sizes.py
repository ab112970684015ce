"""One, two and four workers train the same model on the same batches, and hand over mid-epoch."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from recording_task import consumed_along_committed_line, write_line

from cluster.clock import SYSTEM_CLOCK
from cluster.events import read_events
from cluster.runs import Run
from cluster.storage import open_store
from training.checkpoints.checkpoint import restore_model
from training.checks import prepare
from training.facts import DatasetFacts
from training.recipe import Recipe
from training.tasks import build_task

TESTS = Path(__file__).parents[1]
ROWS = 203


def run_workers(recipe: Recipe, world: int, folder: Path) -> None:
    """Start `world` workers of a run as processes and wait for them."""
    path = folder / f"recipe-{world}.json"
    path.write_text(recipe.model_dump_json())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "ddp_worker.py"), str(path)],
            env={
                **os.environ,
                "PYTHONPATH": str(TESTS),
                "RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
        )
        for rank in range(world)
    ]
    try:
        assert [worker.wait(60) for worker in workers] == [0] * world
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def started(folder: Path, name: str, epochs: int = 2, step_s: float = 0.0) -> tuple[Recipe, Run]:
    (folder / "log").mkdir(exist_ok=True)
    recipe = Recipe.model_validate(
        {
            "model": "line",
            "task": "recording_task:RecordingTask",
            "options": {"log_dir": str(folder / "log"), "step_s": step_s},
            "data": {
                "train": write_line(folder / "train", ROWS),
                "eval": write_line(folder / "eval", 10),
                "label": "y",
            },
            "store": str(folder / "store"),
            "run": name,
            "optimization": {"global_batch_size": 30, "epochs": epochs, "learning_rate": 0.03},
            "checkpoint": {"every_s": None, "every_steps": 4},
        }
    )
    run = Run(open_store(recipe.store), name)
    prepare(run, recipe, SYSTEM_CLOCK.wall())
    return recipe, run


def final_weights(recipe: Recipe, run: Run) -> dict[str, torch.Tensor]:
    task = build_task(recipe.task, DatasetFacts.model_validate(run.record().facts), recipe.options)
    model = task.build_model()
    assert restore_model(model, run.checkpoints(), lambda number, error: pytest.fail(str(error)))
    return dict(model.state_dict())


@pytest.mark.timeout(180)
def test_the_model_does_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    found = {}
    for world in (1, 2, 4):
        recipe, run = started(tmp_path, f"world-{world}")
        run_workers(recipe, world, tmp_path)
        losses = [e["loss"] for e in read_events(run.store, run.prefix) if e["event"] == "step"]
        found[world] = final_weights(recipe, run), losses
    weights, losses = found[1]
    assert len(losses) >= 2
    for world in (2, 4):
        other_weights, other_losses = found[world]
        torch.testing.assert_close(other_weights, weights, rtol=1e-4, atol=1e-5)
        assert other_losses == pytest.approx(losses, rel=1e-4)


@pytest.mark.timeout(180)
def test_workers_change_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    """Two workers train, their last two checkpoints are lost, and one worker goes on from the third last."""
    recipe, run = started(tmp_path, "resized", epochs=3, step_s=0.1)
    run_workers(recipe, 2, tmp_path)
    checkpoints = run.checkpoints()
    head = checkpoints.head()
    assert head >= 3
    for number in (head - 1, head):
        run.store.delete(entry.key for entry in checkpoints.read(number).files.values())

    run_workers(recipe, 1, tmp_path)

    consumed = consumed_along_committed_line(list(read_events(run.store, run.prefix)), tmp_path / "log")
    assert len(consumed) == 21
    for epoch in range(3):
        rows = {row for step in consumed[epoch * 7 : epoch * 7 + 7] for row in step}
        assert rows == set(range(ROWS))
    ledger = checkpoints.read(checkpoints.head()).meta["ledger"]
    assert (ledger[0]["start"], ledger[0]["workers"], ledger[-1]["workers"]) == (0, 2, 1)
    assert ledger[-1]["start"] == ledger[-2]["stop"] == checkpoints.read(head - 2).meta["cursor"]
    assert ledger[-1]["stop"] == 3 * ROWS
