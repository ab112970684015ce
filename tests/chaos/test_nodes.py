"""Nodes of a Ray cluster are lost, announce that they will be, and come back, while a run goes on.

Real Ray, real training; each fault's cost is printed, and no row may be missing or repeated.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from faulty_runs import STEPS, FaultyRun, await_true
from ray_nodes import RayNodes

from training.crew.lending import coordinator_name
from training.run import train

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayNodes]:
    with RayNodes() as nodes:
        yield nodes


@pytest.fixture
def nodes(cluster: RayNodes) -> Iterator[RayNodes]:
    """A head, and nothing else."""
    yield cluster
    cluster.lose_all()


def members(case: FaultyRun) -> list[dict[str, Any]]:
    crew = ray.get_actor(coordinator_name("r", case.recipe.store))
    status = ray.get(crew.status.remote(), timeout=10)
    return sorted((m for m in status["members"].values() if m["rank"] is not None), key=lambda m: m["rank"])


def report(capsys: pytest.CaptureFixture[str], what: str, found: object) -> None:
    with capsys.disabled():
        sys.stdout.write(f"\n{what}: {found}\n")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_lost_node_costs_at_most_a_step_and_a_new_one_is_used(
    nodes: RayNodes, tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    here = [nodes.add(cpus=1), nodes.add(cpus=1)]
    case = FaultyRun(tmp_path, workers={"min": 1, "max": 2})

    def strike() -> None:
        case.await_event("generation-started", world=2)
        case.await_steps(10)
        at_work = members(case)
        assert {member["node"] for member in at_work} == set(here), "each has a node of its own"
        case.strike(lambda: nodes.lose(at_work[rank]["node"]))
        case.await_event("generation-started", world=1)
        case.await_steps(10)
        nodes.add(cpus=1)
        case.await_event("generation-started", world=2)
        case.await_steps(10)

    with case.meanwhile(strike):
        result = train(case.recipe, address=nodes.address, show=case.show)

    assert result.steps == STEPS
    assert [e["source"] for e in case.events("generation-started")] == ["fresh", "memory", "memory"]
    account = case.account("member-lost")
    assert (account.missing, account.repeated) == (0, 0)
    assert account.steps_redone <= 1
    report(capsys, f"node of rank {rank} lost", account)


def test_a_notice_moves_training_off_the_node_in_time(
    nodes: RayNodes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = [nodes.add(cpus=1), nodes.add(cpus=1)]
    case = FaultyRun(tmp_path, workers={"min": 2, "max": 2})
    deadline_s = 40.0

    def strike() -> None:
        case.await_event("generation-started", world=2)
        case.await_steps(10)
        nodes.add(cpus=1)
        case.strike(lambda: nodes.drain(here[0], deadline_s))
        await_true(lambda: len(case.events("generation-started")) == 2, "the move")
        assert here[0] not in {member["node"] for member in members(case)}
        there = nodes.pids(here[0])
        await_true(lambda: not any(map(psutil.pid_exists, there & set(case.lines()))), "an empty node")
        nodes.lose(here[0])
        case.await_steps(10)

    with case.meanwhile(strike):
        result = train(case.recipe, address=nodes.address, show=case.show)

    assert result.steps == STEPS
    assert not case.events("member-lost")
    assert all(e["saved"] for e in case.events("paused") if "saved" in e)
    account = case.account("attempt-paused")
    assert (account.missing, account.repeated, account.steps_redone) == (0, 0, 0)
    (left,) = [e for e in case.events("attempt-paused") if e["rank"] == 0]
    assert case.seconds_since_fault(left["at"]) < deadline_s
    report(capsys, "a node drained", account)


def test_the_head_is_lost_with_the_driver_and_another_cluster_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = FaultyRun(tmp_path, workers={"min": 2, "max": 2})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(case.recipe.model_dump(mode="json")))
    with RayNodes() as first:
        first.add(cpus=2)
        command = [sys.executable, "-m", "cluster.cli", "train", str(file), "--address", first.address]
        with (tmp_path / "output").open("wb") as output:
            driver = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            case.await_event("generation-started", world=2)
            await_true(lambda: bool(case.events("checkpoint-committed")), "a checkpoint")
            case.await_steps(10)

            def lose() -> None:
                os.kill(driver.pid, signal.SIGKILL)
                first.lose_head()

            old = set(case.lines())
            case.strike(lose)
            with RayNodes() as second:
                second.add(cpus=2)

                def watch() -> None:
                    case.await_event("generation-started", world=2)
                    await_true(lambda: not any(map(psutil.pid_exists, old)), "the end of the old processes")

                with case.meanwhile(watch):
                    result = train(case.recipe, address=second.address, show=case.show)
        finally:
            driver.kill()
            driver.wait(10)

    assert result.steps == STEPS
    assert case.events("generation-started")[-1]["source"] == "store"
    account = case.account("attempt-started")
    assert (account.missing, account.repeated) == (0, 0)
    report(capsys, "the head, the driver and the coordinator lost", account)
