"""Trees grown by several processes: one of them dies, is stopped, comes late; the trees are the same."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from members import Company, wait_until

from cluster.clock import SYSTEM_CLOCK
from cluster.runs import Run
from cluster.storage import open_store
from training.checks import prepare
from training.crew.messages import Ended, Joined, Part, Parted, Pause, Paused
from training.data.audit import audit
from training.recipe import Recipe
from training.trees.grown import read_booster

ROUNDS = 200


def write_table(folder: Path, rows: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    columns = {f"x{place}": rng.normal(size=rows) for place in range(12)}
    kinds = rng.integers(0, 8, rows)
    y = sum(columns.values()) + columns["x0"] * kinds + rng.normal(size=rows)
    table = pa.table({**columns, "kind": [f"k{kind}" for kind in kinds], "y": y})
    folder.mkdir()
    pq.write_table(table, folder / "a.parquet", row_group_size=500)
    return str(folder)


def started(folder: Path, name: str, **changes: Any) -> tuple[Recipe, Run]:
    if not (folder / "train").exists():
        write_table(folder / "train", 8000, 1)
        write_table(folder / "eval", 100, 2)
    recipe = Recipe.model_validate(
        {
            "model": "m",
            "task": "boosted-trees",
            "options": {"rounds": ROUNDS, "depth": 5, "early_stopping": {"rounds": ROUNDS, "share": 0.1}},
            "data": {"train": str(folder / "train"), "eval": str(folder / "eval"), "label": "y"},
            "store": str(folder / "store"),
            "run": name,
            "checkpoint": {"every_s": None, "every_steps": 30},
        }
        | changes
    )
    run = Run(open_store(recipe.store), name)
    prepare(run, recipe, SYSTEM_CLOCK.wall())
    return recipe, run


def last_booster(run: Run) -> bytearray:
    artifacts = run.checkpoints()
    manifest = artifacts.last()
    assert manifest is not None
    assert manifest.meta["step"] == ROUNDS
    assert not audit(run).problems
    return read_booster(artifacts, manifest)


def undisturbed(folder: Path) -> bytearray:
    recipe, run = started(folder, "smooth")
    with Company(recipe, run.record().facts) as company:
        company.hire("a", "b")
        company.form("a", "b")
        company.members["a"].hear(Ended)
        company.members["b"].hear(Ended)
    return last_booster(run)


def test_faults_leave_the_trees_as_they_are(tmp_path: Path) -> None:
    """A killed peer, then a stopped one, then both: bit for bit the trees that nothing had happened to."""
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

        wait_until(lambda: run.checkpoints().head() >= 2)
        members["a"].kill(signal.SIGSTOP)  # closes no connection: the other one waits in its exchange
        members["c"].order(Part(generation=2))
        assert members["c"].hear(Parted).step >= 60
        members["a"].kill()
        members["c"].kill()
        company.hire("d", "e")
        company.form("d", "e")
        joined = members["d"].hear(Joined)
        assert joined.source == "store"
        assert joined.step >= 60
        for name in ("d", "e"):
            members[name].hear(Ended)
    assert last_booster(run) == undisturbed(tmp_path)


@pytest.mark.chaos
def test_another_number_of_workers(tmp_path: Path) -> None:
    """Three grow what two began: each round still sees every row once."""
    recipe, run = started(tmp_path, "resized")
    with Company(recipe, run.record().facts) as company:
        company.hire("a", "b", "c")
        generation = company.form("a", "b")
        company.members["a"].hear(Joined)
        company.members["a"].order(Pause(generation=generation, save=True))
        paused = company.members["a"].hear(Paused)
        assert paused.saved
        company.form("c", "b", "a")
        assert company.members["c"].hear(Joined).step == paused.step
        for name in ("a", "b", "c"):
            company.members[name].hear(Ended)
    assert last_booster(run)
