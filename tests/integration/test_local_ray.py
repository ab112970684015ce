"""A local Ray leaves nothing behind, however its user, its holder or its own processes die."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster import machine
from cluster.cli import main
from cluster.connection import Unreachable, connect
from cluster.errors import BadInput
from cluster.local import LocalRay, find, running, stop_all

GONE_DEADLINE_S = 30


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "state"
    monkeypatch.setenv("TANDEM_STATE_DIR", str(folder))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.ray/auth_token
    yield folder
    stop_all()


def await_(true: Callable[[], bool], deadline_s: float = GONE_DEADLINE_S) -> None:
    give_up_s = time.monotonic() + deadline_s
    while not true():
        assert time.monotonic() < give_up_s, "not within the deadline"
        time.sleep(0.1)


def assert_gone(local: LocalRay) -> None:
    assert machine.processes(local.record.id) == []
    assert not Path(local.record.temp_dir).exists()
    assert not local.record.path.exists()


def addresses_of(local: LocalRay) -> set[str]:
    """The addresses that its processes listen at."""
    return {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in machine.processes(local.record.id)
        for connection in process.net_connections()
        if connection.status == psutil.CONN_LISTEN
    }


def test_two_at_once_are_used_in_turn_and_leave_nothing(state: Path) -> None:
    import ray

    with LocalRay.start(num_cpus=1) as one, LocalRay.start(num_cpus=2, env={"MARK": "here"}) as two:
        assert [local.record.id for local in running()] == [one.record.id, two.record.id]
        assert addresses_of(one) == addresses_of(two) == {"127.0.0.1"}
        assert one.record.path.stat().st_mode & 0o777 == 0o600
        assert find(two.address).record.id == two.record.id

        # One task in either, by address alone, by handle, and back again: each has a token of its own.
        for local, kwargs in ((one, {"local": one}), (two, {}), (one, {})):
            with connect(None if kwargs else local.address, **kwargs) as address:
                assert address == local.address
                seen = ray.get(ray.remote(lambda: dict(os.environ)).remote(), timeout=60)
                assert seen[machine.ID_VARIABLE] == local.record.id
                assert seen.get("MARK") == ("here" if local is two else None)
        assert "RAY_AUTH_TOKEN" not in os.environ

        # As somebody who doesn't know the token:
        token_of = one.record.token
        one.record.path.unlink()
        with pytest.raises(Unreachable, match="refused us") as refused, connect(one.address):
            pass
        assert refused.value.got == "no token"
        os.environ["RAY_AUTH_TOKEN"] = "wrong"
        with pytest.raises(Unreachable) as refused, connect(one.address):
            pass
        assert refused.value.got == "a wrong token"
        os.environ["RAY_AUTH_TOKEN"] = token_of
        with connect(one.address):
            assert ray.cluster_resources()["CPU"] == 1
        one.stop()
        one.stop()
        assert_gone(one)
        assert two.alive
    assert_gone(two)
    assert list(state.iterdir()) == []


@pytest.mark.parametrize("address", ["ray://127.0.0.1:1", "http://127.0.0.1:1", "nonsense", "a:b", ":1", ""])
def test_an_address_that_no_driver_can_use(address: str) -> None:
    with pytest.raises(BadInput), connect(address):
        pass


def test_an_address_where_nothing_answers() -> None:
    with pytest.raises(Unreachable, match="no Ray cluster answers"), connect("127.0.0.1:9"):
        pass


PARENT = """
import sys, time
from cluster.local import LocalRay
local = LocalRay.start(num_cpus=1, tied=sys.argv[1] == "tied", purpose="test")
print(local.record.id, flush=True)
time.sleep(600)
"""


def start_parent(mode: str) -> tuple[subprocess.Popen[str], LocalRay]:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, mode], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    local_id = parent.stdout.readline().strip()
    parent.stdout.close()
    return parent, next(local for local in running() if local.record.id == local_id)


def kill(parent: subprocess.Popen[str]) -> None:
    parent.kill()
    parent.wait(10)


def test_a_tied_one_ends_when_its_user_is_killed() -> None:
    parent, local = start_parent("tied")
    assert len(machine.processes(local.record.id)) >= 4
    kill(parent)
    await_(lambda: not machine.processes(local.record.id) and not local.record.path.exists())
    assert_gone(local)


def test_down_ends_what_outlived_its_user_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        parent, local = start_parent("untied")
        kill(parent)
        time.sleep(1)
        assert local.alive
        assert main(["status"]) == 0
        assert local.address in capfd.readouterr().out
        assert main(["down", "--json"]) == 0
        assert local.record.id in capfd.readouterr().out
        assert_gone(local)
        assert bystander.poll() is None
        assert main(["down"]) == 0
        assert capfd.readouterr().out == "nothing was running\n"
    finally:
        bystander.kill()
        bystander.wait(10)


def test_down_ends_the_command_in_front_of_it_at_once() -> None:
    program = """
import time
from cluster.commands.foreground import ends_with_its_ray
from cluster.local import LocalRay
with ends_with_its_ray(), LocalRay.start(num_cpus=1, purpose="a command"):
    print("up", flush=True)
    time.sleep(600)
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            (local,) = running()
            assert main(["down"]) == 0
            _, said = process.communicate(timeout=20)
            assert process.returncode == 1
            assert "the Ray of this command ('a command') is gone" in said
            assert_gone(local)
        finally:
            process.kill()


def test_down_reaps_what_a_killed_holder_left() -> None:
    local = LocalRay.start(num_cpus=1)
    assert local.record.holder_pid is not None
    os.kill(local.record.holder_pid, signal.SIGKILL)
    local._holder.wait(10)
    assert machine.processes(local.record.id), "Ray goes on without its holder"
    assert not local.alive
    stop_all()
    assert_gone(local)


def test_a_raylet_that_dies_takes_its_ray_with_it() -> None:
    local = LocalRay.start(num_cpus=1)
    raylet = next(p for p in machine.processes(local.record.id) if p.name() == "raylet")
    raylet.kill()
    await_(lambda: not local.record.path.exists())
    local.stop()
    assert_gone(local)


def test_up_stays_after_the_command_and_down_ends_it(capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "cluster.cli", "up", "--cpus", "1", "--json"]
    subprocess.run(command, check=True, timeout=90, stdout=subprocess.DEVNULL)
    (local,) = running()
    assert local.alive
    with connect(local.address):
        pass
    assert main(["down"]) == 0
    assert_gone(local)
