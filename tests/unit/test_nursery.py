"""The nursery starts processes, tells how they ended, and leaves none behind. Real processes, no Ray."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from training.crew.messages import Leave, Ready, Spec, parse_saying, send
from training.crew.nursery import SINGLE_THREADED, receive_frame, send_frame

TESTS = Path(__file__).parents[1]


class Keeper:
    """What a keeper does, with blocking sockets."""

    def __init__(self, life: str) -> None:
        self.control, theirs = socket.socketpair()
        self.control.settimeout(30)
        with theirs:
            self.nursery = subprocess.Popen(
                [sys.executable, "-m", "training.crew.nursery", str(theirs.fileno()), str(os.getpid()), life],
                pass_fds=[theirs.fileno()],
                env={**os.environ, **SINGLE_THREADED, "PYTHONPATH": str(TESTS)},
            )
        self.up = self.frame()

    def frame(self) -> dict:
        frame = receive_frame(self.control)
        assert frame is not None, "the nursery ended"
        return frame[0]

    def hire(self, member: str, folder: Path, **environment: str) -> tuple[int, socket.socket]:
        ours, theirs = socket.socketpair()
        spec = Spec(
            recipe={"options": {"log_dir": str(folder), "steps": 1, "step_s": 0}},
            run="r",
            facts={"padding": "x" * 300_000},
            epoch=0,
            member=member,
            environment=environment,
        )
        with theirs:
            send_frame(self.control, {"hire": spec.model_dump(mode="json")}, theirs)
        ours.settimeout(30)
        born = self.frame()
        assert born["born"] == member
        return born["pid"], ours


@pytest.fixture(scope="module")
def keeper() -> Iterator[Keeper]:
    keeper = Keeper("fake_member:live")
    yield keeper
    keeper.control.close()
    assert keeper.nursery.wait(10) == 0


def gone(pid: int) -> bool:
    """Whether a process is over, within 10 s."""
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(10)
    return not psutil.pid_exists(pid)


def test_a_member_speaks_leaves_and_its_end_is_told(keeper: Keeper, tmp_path: Path) -> None:
    assert keeper.up["threads"] == 1, "it can fork"
    pid, channel = keeper.hire("m1", tmp_path, TANDEM_TEST_VALUE="7")
    with channel, channel.makefile("rb") as lines:
        while not isinstance(said := parse_saying(lines.readline()), Ready):
            pass
        assert said.pid == pid
        assert os.getpgid(pid) == pid, "a session of its own"
        send(channel, Leave())
        assert keeper.frame() == {"ended": "m1", "pid": pid, "code": 0}


def test_how_it_ended_is_told_even_of_a_stopped_one(keeper: Keeper, tmp_path: Path) -> None:
    pid, channel = keeper.hire("m2", tmp_path)
    with channel:
        os.kill(pid, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        assert keeper.frame() == {"ended": "m2", "pid": pid, "code": -signal.SIGKILL}


@pytest.mark.parametrize(
    "how", ["the keeper closes", "the nursery is killed", "the nursery is stopped and killed"]
)
def test_nothing_outlives_its_maker(tmp_path: Path, how: str) -> None:
    keeper = Keeper("fake_member:live")
    members = [keeper.hire(f"m{n}", tmp_path) for n in range(2)]
    os.kill(members[0][0], signal.SIGSTOP)
    if how == "the keeper closes":
        keeper.control.close()
    else:
        if "stopped" in how:
            keeper.nursery.send_signal(signal.SIGSTOP)
        keeper.nursery.kill()
    keeper.nursery.wait(10)
    assert all(gone(pid) for pid, _ in members)
    for _, channel in members:
        channel.close()
    keeper.control.close()


def test_where_forking_is_unsafe_members_are_processes_of_their_own(tmp_path: Path) -> None:
    keeper = Keeper("threaded_life:live")
    assert keeper.up["threads"] > 1
    pid, channel = keeper.hire("m1", tmp_path)
    with channel, channel.makefile("rb") as lines:
        while not isinstance(parse_saying(lines.readline()), Ready):
            pass
    keeper.control.close()
    assert keeper.nursery.wait(10) == 0
    assert gone(pid)


def test_a_frame_of_many_parts_arrives_whole() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        pid = os.fork()
        if pid == 0:
            send_frame(theirs, {"text": "é" * 1_000_000})
            os._exit(0)
        theirs.close()
        frame = receive_frame(ours)
        assert frame is not None
        assert frame[0] == {"text": "é" * 1_000_000}
        assert receive_frame(ours) is None
        os.waitpid(pid, 0)


def test_time_to_fork_is_not_that_of_an_interpreter(keeper: Keeper, tmp_path: Path) -> None:
    """No time is asserted; that members come from the nursery itself is."""
    pid, channel = keeper.hire("m3", tmp_path)
    with channel:
        assert psutil.Process(pid).ppid() == keeper.nursery.pid
        deadline_s = time.monotonic() + 10
        os.kill(pid, signal.SIGKILL)
        assert keeper.frame()["code"] == -signal.SIGKILL
        assert time.monotonic() < deadline_s
