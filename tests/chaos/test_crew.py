"""Every process of a run is killed or stopped in turn; `make chaos`, not in the default suite.

The training processes are pretended (tests/fake_member.py): what is tried here is who starts, watches and
replaces them. Figures that people ask for are printed; only generous bounds are asserted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from cluster.connection import connect
from cluster.errors import RunFailed
from cluster.events import read_events
from cluster.local import LocalRay
from cluster.runs import Run
from cluster.storage import open_store
from training.crew.lending import coordinator_name
from training.facts import DatasetFacts
from training.progress import Progress
from training.recipe import Recipe
from training.trainer import call, fit

TESTS = Path(__file__).parents[1]
LIFE = "fake_member:live"
FACTS = DatasetFacts.model_construct(fingerprint="f", rows=1, label="y", columns={})

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def connected() -> Iterator[None]:
    with (
        LocalRay.start(num_cpus=3, env={"PYTHONPATH": str(TESTS)}, purpose="chaos") as local,
        connect(local.address),
    ):
        yield


class Case:
    """One run of two workers, and the fault that is to strike it."""

    def __init__(self, folder: Path, steps: int = 150, least: int = 2, step_s: float = 0.1) -> None:
        (folder / "log").mkdir()
        self.log, self.steps = folder / "log", steps
        self.recipe = Recipe.model_validate(
            {
                "model": "m",
                "task": "tabular-regression",
                "options": {"log_dir": str(self.log), "steps": steps, "step_s": step_s},
                "data": {"train": str(folder), "eval": str(folder)},
                "store": str(folder / "store"),
                "workers": {"min": least, "max": 2},
            }
        )
        self.notes: list[str] = []
        self.struck_s = 0.0

    def run(self, strike: Callable[[dict[str, Any]], None]) -> Any:
        """Train, and strike once 20 steps are made; `strike` gets the run's status."""
        threading.Thread(target=self._aim, args=(strike,), daemon=True).start()
        return fit(self.recipe, "case", FACTS, call(self.recipe, LIFE), self._show)

    def lines(self) -> list[dict[str, Any]]:
        found = [
            json.loads(line) for file in self.log.glob("*.jsonl") for line in file.read_text().splitlines()
        ]
        return sorted(found, key=lambda line: line["at"])

    def idle_s(self) -> float:
        """The longest time without a step of anyone, since the fault."""
        times = [line["at"] for line in self.lines() if line["at"] > self.struck_s - 1]
        return max(b - a for a, b in pairwise(times))

    def events(self, name: str) -> list[dict[str, Any]]:
        run = Run(open_store(self.recipe.store), "case")
        return [e for e in read_events(run.store, run.prefix) if e["event"] == name]

    def _show(self, progress: Progress) -> None:
        if progress.note:
            self.notes.append(progress.note)

    def _aim(self, strike: Callable[[dict[str, Any]], None]) -> None:
        while not any(line["step"] >= 20 for line in self.lines()):
            time.sleep(0.05)
        crew = ray.get_actor(coordinator_name("case", self.recipe.store))
        status = ray.get(crew.status.remote())
        self.struck_s = time.monotonic()
        strike(status)


def pids(named: str) -> list[int]:
    """Of the Ray processes that are called so."""
    return [p.pid for p in psutil.process_iter() if f"ray::{named}" in " ".join(_command(p))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def member(status: dict[str, Any], rank: int) -> int:
    return next(m["pid"] for m in status["members"].values() if m["rank"] == rank)


def report(capsys: pytest.CaptureFixture[str], what: str, seconds: float) -> None:
    with capsys.disabled():
        sys.stdout.write(f"\n{what}: {seconds:.2f} s without a step\n")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_member_is_killed(
    connected: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    case = Case(tmp_path)
    outcome = case.run(lambda status: os.kill(member(status, rank), signal.SIGKILL))
    assert outcome.steps == case.steps
    assert [e["source"] for e in case.events("generation-started")] == ["fresh", "memory"]
    report(capsys, f"rank {rank} killed", case.idle_s())


def test_a_member_is_stopped(connected: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(tmp_path)
    outcome = case.run(lambda status: os.kill(member(status, 1), signal.SIGSTOP))
    assert outcome.steps == case.steps
    (lost,) = case.events("member-lost")
    assert "silent" in lost["how"]
    assert case.idle_s() < 15
    report(capsys, "rank 1 stopped", case.idle_s())


def test_an_attendant_is_killed(connected: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = Case(tmp_path)
    outcome = case.run(lambda _: os.kill(pids("Attendant")[0], signal.SIGKILL))
    assert outcome.steps == case.steps
    assert len(case.events("generation-started")) == 1, "training never noticed"
    report(capsys, "attendant killed", case.idle_s())


def test_the_controller_is_killed(
    connected: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path)
    outcome = case.run(lambda _: [os.kill(pid, signal.SIGKILL) for pid in pids("Controller.run")] and None)
    assert outcome.steps == case.steps
    assert len(case.events("generation-started")) == 1, "training never noticed"
    assert any("controller was lost" in note for note in case.notes)
    report(capsys, "Ray Train's controller killed", case.idle_s())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_keeper_is_lost(
    connected: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    case = Case(tmp_path, steps=60)
    outcome = case.run(lambda _: os.kill(pids("Keeper")[0], number))
    assert outcome.steps == case.steps
    report(capsys, f"keeper {number.name}", case.idle_s())


def test_the_coordinator_is_killed(connected: None, tmp_path: Path) -> None:
    case = Case(tmp_path)
    members: list[int] = []

    def strike(status: dict[str, Any]) -> None:
        members.extend(m["pid"] for m in status["members"].values())
        os.kill(pids("Coordinator")[0], signal.SIGKILL)

    with pytest.raises(RunFailed, match="coordinator of run 'case' was lost"):
        case.run(strike)
    give_up_s = time.monotonic() + 20
    while any(psutil.pid_exists(pid) for pid in members) and time.monotonic() < give_up_s:
        time.sleep(0.1)
    assert not any(psutil.pid_exists(pid) for pid in members), "no training process outlives its run"
    assert fit(case.recipe, "case", FACTS, call(case.recipe, LIFE), case._show).steps == case.steps


def test_an_error_that_cannot_be_mended_ends_the_run_at_once(connected: None, tmp_path: Path) -> None:
    from cluster.errors import BadInput

    case = Case(tmp_path)
    options = {**case.recipe.options, "fails_at": 3}
    faulty = case.recipe.model_copy(update={"options": options})
    with pytest.raises(BadInput, match="it can't be"):
        fit(faulty, "case", FACTS, call(faulty, LIFE), case._show)


def test_a_loan_frees_the_capacity_soon(
    connected: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(tmp_path, steps=200, least=1)
    answers: list[dict[str, Any]] = []

    def borrow(_: dict[str, Any]) -> None:
        crew = ray.get_actor(coordinator_name("case", case.recipe.store))
        answers.append(ray.get(crew.lend.remote(1, 3.0)))

    assert case.run(borrow).steps == case.steps
    assert [(e["from"], e["to"]) for e in case.events("resize")] == [(2, 1), (1, 2)]
    with capsys.disabled():
        sys.stdout.write(
            f"\nlent after {answers[0]['took_s']} s; at most {case.idle_s():.2f} s without a step\n"
        )
