"""Fifty seeded SIGKILLs with a change of world size after each: no row missing, none repeated.

Workers are processes without Ray, started as torchrun would; one of them or all are killed at a
random step, or while they start, and the run goes on with 2, 1, 3, 2 … workers. Each process writes
down the rows that it was trained on (`recording_task`). Which step a line is of follows from the rows
alone, since no two steps have the same, so nothing here relies on events that a kill may swallow.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from recording_task import write_line

from cluster.clock import SYSTEM_CLOCK
from cluster.runs import Run
from cluster.storage import open_store
from training.checks import prepare
from training.data.audit import audit
from training.data.dataset import Dataset
from training.data.plan import rank_slice
from training.data.share import Share
from training.recipe import Recipe

TESTS = Path(__file__).parents[1]
ROWS, BATCH, EPOCHS = 500, 64, 12
STEPS_PER_EPOCH = -(-ROWS // BATCH)
STEPS = STEPS_PER_EPOCH * EPOCHS
KILLS = 10
WORLDS = (2, 1, 3)
STARTED_WITHIN_S = 60
ENDED_WITHIN_S = 120
GONE_WITHIN_S = 20

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]


@dataclass
class Attempt:
    """Processes that were started together, by rank."""

    workers: list[subprocess.Popen[bytes]]
    log_dir: Path

    def lines(self, rank: int) -> list[list[int]]:
        """The rows of each step that a rank began, padding included."""
        log = self.log_dir / f"{self.workers[rank].pid}.jsonl"
        whole = (
            [line for line in log.read_text().splitlines(True) if line.endswith("\n")] if log.exists() else []
        )
        return [[row for row in json.loads(line) if not isinstance(row, str)] for line in whole]


def start(recipe_path: Path, world: int, log_dir: Path) -> Attempt:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "PYTHONPATH": str(TESTS),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(TESTS / "ddp_worker.py"), str(recipe_path)]
    with (log_dir / "output").open("ab") as output:
        workers = [
            subprocess.Popen(command, env={**common, "RANK": str(rank)}, stdout=output, stderr=output)
            for rank in range(world)
        ]
    return Attempt(workers, log_dir)


def kill(attempt: Attempt, rng: random.Random) -> None:
    """Kill one worker or all, at a random step or in the middle of the start; then nobody is left."""
    give_up_s = time.monotonic() + STARTED_WITHIN_S
    steps = rng.choice([0, *range(3, 9)])
    while len(attempt.lines(0)) < steps and time.monotonic() < give_up_s:
        assert all(worker.poll() is None for worker in attempt.workers), "ended before it was killed"
        time.sleep(0.01)
    # In the step, or after however much of starting Python and reading the checkpoint takes.
    time.sleep(rng.uniform(0, 0.05) if steps else rng.uniform(0, 4))
    for worker in rng.choice([attempt.workers, [rng.choice(attempt.workers)]]):
        worker.send_signal(signal.SIGKILL)
    until_s = time.monotonic() + GONE_WITHIN_S
    for worker in attempt.workers:
        try:
            # The others notice it themselves; how soon is another test's matter.
            worker.wait(max(0.0, min(until_s - time.monotonic(), rng.uniform(0, 3))))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait(GONE_WITHIN_S)


def committed_rows(attempts: list[Attempt], dataset: Dataset, seed: int) -> list[list[int]]:
    """The rows of each step along the committed line: an attempt counts up to where the next began."""
    plan = dataset.plan(seed)
    steps: list[list[int]] = []
    for attempt in attempts:
        world = len(attempt.workers)
        first_of: dict[tuple[int, ...], int] = {}
        real: list[list[int]] = []
        cursor = 0
        for step in range(STEPS):
            batch = plan.batch(cursor, BATCH)
            positions, _ = Share(plan, BATCH, 0, world, 0).positions(batch)
            ids = plan.row_ids(batch.epoch, 0, ROWS)[positions]
            first_of[tuple(int(row) for row in ids)] = step
            slices = [rank_slice(batch.start, batch.stop, rank, world) for rank in range(world)]
            real.append([stop - start for start, stop in slices])
            cursor += batch.rows
        assert len(first_of) == STEPS, "two steps have the same rows"
        of_ranks = list(zip(*(attempt.lines(rank) for rank in range(world)), strict=False))
        if not of_ranks:
            continue
        began = first_of[tuple(of_ranks[0][0])]
        assert began <= len(steps), "an attempt can't begin after a gap"
        del steps[began:]
        for lines in of_ranks:
            counts = real[len(steps)]
            steps.append([row for line, n in zip(lines, counts, strict=True) for row in line[:n]])
    return steps


@pytest.mark.parametrize("seed", range(5))
def test_kills_and_resizes_lose_and_repeat_nothing(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    log_dir = tmp_path / "log"
    log_dir.mkdir()
    recipe = Recipe.model_validate(
        {
            "model": "line",
            "task": "recording_task:RecordingTask",
            "options": {"log_dir": str(log_dir), "step_s": 0.05},
            "data": {
                "train": write_line(tmp_path / "train", ROWS),
                "eval": write_line(tmp_path / "eval", 10),
                "label": "y",
            },
            "store": str(tmp_path / "store"),
            "run": f"seed-{seed}",
            "optimization": {"global_batch_size": BATCH, "epochs": EPOCHS, "learning_rate": 0.03},
            "checkpoint": {"every_s": None, "every_steps": 2},
        }
    )
    run = Run(open_store(recipe.store), f"seed-{seed}")
    prepare(run, recipe, SYSTEM_CLOCK.wall())
    path = tmp_path / "recipe.json"
    path.write_text(recipe.model_dump_json())

    attempts: list[Attempt] = []
    worlds = itertools.cycle(WORLDS)
    for _ in range(KILLS):
        attempts.append(start(path, next(worlds), log_dir))
        kill(attempts[-1], rng)
    attempts.append(start(path, next(worlds), log_dir))
    try:
        ended = [worker.wait(ENDED_WITHIN_S) for worker in attempts[-1].workers]
    finally:
        for worker in attempts[-1].workers:
            worker.kill()
            worker.wait(GONE_WITHIN_S)
    assert not any(ended), (log_dir / "output").read_text()[-4000:]

    steps = committed_rows(attempts, Dataset.open(recipe.data.train), recipe.optimization.seed)
    assert len(steps) == STEPS
    for epoch in range(EPOCHS):
        rows = [row for step in steps[epoch * STEPS_PER_EPOCH :][:STEPS_PER_EPOCH] for row in step]
        assert np.array_equal(np.bincount(rows, minlength=ROWS), np.ones(ROWS))
    found = audit(run)
    assert found.problems == ()
    assert found.cursor == ROWS * EPOCHS
    assert found.attempts > KILLS // 2
