"""Through the whole of Ray: a run whose worker was killed ends with the very bytes of one left in peace."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from recording_task import write_line

from cluster.events import read_events
from cluster.local import LocalRay
from cluster.runs import Run
from cluster.storage import open_store
from training.checkpoints.checkpoint import restore
from training.facts import DatasetFacts
from training.loop import new_state
from training.progress import Progress
from training.recipe import Recipe
from training.run import train
from training.tasks import build_task

TESTS = Path(__file__).parents[1]
EPOCHS, STEPS_PER_EPOCH = 3, 8

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    with LocalRay.start(num_cpus=2, env={"PYTHONPATH": str(TESTS)}, purpose="tests") as local:
        yield local.address


def recipe(folder: Path, name: str, step_s: float) -> Recipe:
    log = folder / f"log-{name}"
    log.mkdir()
    return Recipe.model_validate(
        {
            "model": "line",
            "task": "recording_task:RecordingTask",
            "options": {"log_dir": str(log), "step_s": step_s},
            "data": {
                "train": write_line(folder / "train", 500),
                "eval": write_line(folder / "eval", 50),
                "label": "y",
            },
            "store": str(folder / "store"),
            "run": name,
            "workers": {"min": 2, "max": 2},
            "optimization": {"global_batch_size": 64, "epochs": EPOCHS, "learning_rate": 0.03},
            "checkpoint": {"every_s": None, "every_steps": 7},
        }
    )


def kill_one_when_stepping(log: Path, steps: int, killed: list[int]) -> threading.Thread:
    """Kills a training process once one of them has made so many steps."""

    def watch() -> None:
        deadline_s = time.monotonic() + 90
        while time.monotonic() < deadline_s and not killed:
            made = {int(f.stem): len(f.read_text().splitlines()) for f in log.glob("*.jsonl")}
            if len(made) == 2 and max(made.values()) >= steps:
                killed.append(max(made))
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def final_bytes(run: Run, asked: Recipe) -> dict[str, bytes]:
    """Every tensor of the run's last checkpoint: the model's and the optimizer's."""
    facts = DatasetFacts.model_validate(run.record().facts)
    task = build_task(asked.task, facts, asked.options)
    state = new_state(task, asked.optimization, torch.device("cpu"))
    found = restore(state, run.checkpoints(), lambda number, error: None)
    assert found is not None
    assert (found.number, found.meta.step) == (found.head, EPOCHS * STEPS_PER_EPOCH)
    tensors = dict(state.model.state_dict())
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state[parameter].items():
            tensors[f"{name}/{key}"] = value
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_a_run_with_a_kill_ends_with_the_bytes_of_one_without(ray_address: str, tmp_path: Path) -> None:
    def show(_: Progress) -> None: ...

    disturbed, smooth = recipe(tmp_path, "disturbed", 0.05), recipe(tmp_path, "smooth", 0.0)
    killed: list[int] = []
    watching = kill_one_when_stepping(tmp_path / "log-disturbed", 10, killed)
    train(disturbed, address=ray_address, show=show)
    watching.join(1)
    train(smooth, address=ray_address, show=show)

    store = open_store(smooth.store)
    runs = [Run(store, name) for name in ("disturbed", "smooth")]
    lost = [[e for e in read_events(store, r.prefix) if e["event"] == "member-lost"] for r in runs]
    assert killed, "the fault never happened"
    assert [len(losses) for losses in lost] == [1, 0]
    one, other = final_bytes(runs[0], disturbed), final_bytes(runs[1], smooth)
    assert one == other
