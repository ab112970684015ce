"""Seeded campaigns of SIGKILL against training; `make chaos`, not in the default suite.

Each campaign kills workers at random steps, sometimes more than one, and counts every sample along the
committed line. The seed is in the test's name, so a failure can be run again.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from recording_task import consumed_along_committed_line, write_line

from cluster.events import read_events
from cluster.local import LocalRay
from cluster.runs import Run
from cluster.storage import open_store
from training.recipe import Recipe
from training.run import train

TESTS = Path(__file__).parents[1]
ROWS, BATCH, EPOCHS = 500, 64, 5
STEPS = 8 * EPOCHS

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    with LocalRay.start(num_cpus=3, env={"PYTHONPATH": str(TESTS)}, purpose="chaos") as local:
        yield local.address


class Killer(threading.Thread):
    """Kills a random rank whenever the run's own log reaches the next of the planned steps."""

    def __init__(self, run: Run, log_dir: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self._run = run
        self._log_dir = log_dir
        self._random = random.Random(seed)
        self._at_steps = sorted(self._random.sample(range(2, STEPS - 4), 3))
        self.killed: list[int] = []
        self.over = threading.Event()

    def run(self) -> None:
        while self._at_steps and not self.over.wait(0.02):
            starts = [
                e for e in read_events(self._run.store, self._run.prefix) if e["event"] == "attempt-started"
            ]
            newest = {e["rank"]: e for e in starts}
            if len(newest) < 2:
                continue
            target = newest[self._random.choice(sorted(newest))]
            log = self._log_dir / f"{target['pid']}.jsonl"
            done = target["step"] + (len(log.read_text().splitlines()) if log.exists() else 0)
            if target["pid"] not in self.killed and done >= self._at_steps[0]:
                try:
                    os.kill(target["pid"], signal.SIGKILL)
                except ProcessLookupError:
                    continue
                self.killed.append(target["pid"])
                self._at_steps.pop(0)
                time.sleep(1)


@pytest.mark.parametrize("seed", range(4))
def test_kills_at_random_steps_lose_and_repeat_nothing(ray_address: str, tmp_path: Path, seed: int) -> None:
    (tmp_path / "log").mkdir()
    recipe = Recipe.model_validate(
        {
            "model": "line",
            "task": "recording_task:RecordingTask",
            "options": {"log_dir": str(tmp_path / "log"), "step_s": 0.05},
            "data": {
                "train": write_line(tmp_path / "train", ROWS),
                "eval": write_line(tmp_path / "eval", 50),
                "label": "y",
            },
            "store": str(tmp_path / "store"),
            "run": f"seed-{seed}",
            "workers": {"min": 2, "max": 2},
            "optimization": {"global_batch_size": BATCH, "epochs": EPOCHS, "learning_rate": 0.03},
            "checkpoint": {"every_s": None, "every_steps": 3},
            "max_failures": 10,
        }
    )
    run = Run(open_store(recipe.store), f"seed-{seed}")
    killer = Killer(run, tmp_path / "log", seed)
    killer.start()
    result = train(recipe, address=ray_address, show=lambda progress: None)
    killer.over.set()
    killer.join(10)

    assert killer.killed, "the fault never happened"
    assert result.steps == STEPS
    steps = consumed_along_committed_line(list(read_events(run.store, run.prefix)), tmp_path / "log")
    assert len(steps) == STEPS
    for epoch in range(EPOCHS):
        rows = [row for step in steps[epoch * 8 : epoch * 8 + 8] for row in step]
        assert sorted(rows) == list(range(ROWS))
