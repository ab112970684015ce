"""A worker is killed for want of memory; the store's disk is full. By the kernel, and on a real disk.

Without Ray (`led_crew`): the roster is the real one, and so is what counts the kernel's kills.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_runs import STEPS, FaultyRun
from led_crew import LedCrew, Post

from cluster.clock import SYSTEM_CLOCK
from cluster.errors import TandemError
from training.checks import prepare
from training.crew.roles import Outcome
from training.data.audit import audit

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(240)]
WITHIN_S = 120
LIMIT_MIB = 1500
"""Two processes with torch fit into it."""
_COUNT = "from training.crew.keeper import oom_kills; print(oom_kills())"


@pytest.fixture
def starved() -> Iterator[Post]:
    """A memory cgroup of version 1 or 2, with a limit."""
    first, second = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    group = (first if first.is_dir() else second) / f"tandem-{os.getpid()}"
    try:
        group.mkdir()
        limit = "memory.limit_in_bytes" if first.is_dir() else "memory.max"
        (group / limit).write_text(str(LIMIT_MIB << 20))
    except OSError as error:
        pytest.skip(f"no memory cgroup can be made here: {error}")
    enter = f'echo $$ > {group}/cgroup.procs && exec "$@"'
    yield Post(within=("sh", "-c", enter, "sh"))
    give_up_s = time.monotonic() + 10
    while group.exists() and time.monotonic() < give_up_s:
        with contextlib.suppress(OSError):  # its processes are on their way out
            group.rmdir()
        time.sleep(0.05)


def led(case: FaultyRun, post: Post, workers: int = 2) -> LedCrew:
    prepare(case.run, case.recipe, SYSTEM_CLOCK.wall())

    def kills() -> int:
        """As the keeper counts, in a process that has the limit."""
        command = [*post.within, sys.executable, "-c", _COUNT]
        return int(subprocess.run(command, check=True, capture_output=True).stdout)

    return LedCrew(case.recipe, case.run.record().facts, [post] * workers, kills)


@pytest.mark.parametrize("once", [True, False], ids=["once", "always"])
def test_a_worker_killed_for_want_of_memory(
    starved: Post, tmp_path: Path, capsys: pytest.CaptureFixture[str], once: bool
) -> None:
    options = {"log_dir": str(tmp_path / "log"), "eats_mib": 4 * LIMIT_MIB, "row": 77.0, "once": once}
    case = FaultyRun(tmp_path, task="hungry_task:HungryTask", options=options, workers={"min": 2, "max": 2})
    with led(case, starved) as crew:
        end = crew.lead(WITHIN_S, lambda: crew.step > 12 and case.hurry())
    lost = [r.fields["how"] for _, r in crew.records if r.event == "member-lost"]
    if once:
        assert isinstance(end, Outcome), end
        assert lost == ["out of memory"]
        found = audit(case.run)
        assert (end.steps, found.problems) == (STEPS, ())
        redone = case.steps_begun() - STEPS
        assert redone <= 1
        with capsys.disabled():
            sys.stdout.write(f"\nout of memory once: {redone} redone, 0 rows missing or repeated\n")
    else:
        assert isinstance(end, TandemError), end
        assert lost == ["out of memory"] * 3
        assert "out of memory" in end.got
        assert "on node" in end.got
        assert "micro_batch_size" in end.fix
        with capsys.disabled():
            sys.stdout.write(f"\nout of memory always: {end}\n")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)


@pytest.mark.parametrize("freed", [True, False], ids=["freed", "full-to-the-end"])
def test_a_full_disk(disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], freed: bool) -> None:
    case = FaultyRun(
        tmp_path,
        store=str(disk / "store"),
        checkpoint={"every_s": None, "every_steps": 10, "retry_s": 3},
    )
    given_up: list[int] = []

    def watch() -> None:
        if crew.step >= 15 and not (disk / "filler").exists() and not given_up:
            fill(disk)
        if not given_up and any("was not written" in note for note in crew.notes):
            given_up.append(crew.step)
            if freed:
                (disk / "filler").unlink()
            case.hurry()

    with led(case, Post(), workers=1) as crew:
        end = crew.lead(WITHIN_S, watch)
    assert given_up, "training went on without a checkpoint, and said so"
    assert given_up[0] > 20, "it didn't wait for the disk"
    if freed:
        assert isinstance(end, Outcome), end
        found = audit(case.run)
        assert (end.steps, found.step, found.problems) == (STEPS, STEPS, ())
        assert case.events("checkpoint-failed")
    else:
        assert isinstance(end, TandemError), end
        assert "last checkpoint" in end.got  # the note says why
        assert case.run.checkpoints().last() is not None, "the last checkpoint is whole"
    with capsys.disabled():
        what = next(note for note in crew.notes if "was not written" in note)
        sys.stdout.write(f"\na full disk: at step {given_up[0]}: {what}\n  {'' if freed else end}\n")
