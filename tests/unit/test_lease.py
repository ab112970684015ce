"""The lease: one driver a run, the dead are replaced, the living left alone, and the replaced shut out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from threading import Barrier

import pytest

from cluster import lease as lease_module
from cluster.errors import Conflict, StorageError
from cluster.lease import SILENT_S, Lease, acquire
from cluster.manifest import Writer
from cluster.process import ProcessName, this_process
from cluster.runs import Run
from cluster.storage import Store, memory_store

ELSEWHERE = ProcessName(host="node-7", pid=4711, machine="another kernel", start_ticks=5)


class FakeClock:
    """Advances by itself when slept on; `during` happens in every sleep."""

    def __init__(self, during: Callable[[], object] = lambda: None) -> None:
        self.now_s = 0.0
        self.during = during

    def wall(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC)

    def monotonic_s(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s
        self.during()


@pytest.fixture(autouse=True)
def _beats_only_when_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_EVERY_S", 3600.0)


@pytest.fixture
def run() -> Run:
    return Run(memory_store(), "r")


def from_elsewhere(run: Run) -> Lease:
    return acquire(run, process=lambda: ELSEWHERE)


def a_dead_process() -> ProcessName:
    """The name of a process that has ended."""
    code = "from cluster.process import this_process; print(this_process().model_dump_json())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60).stdout
    return ProcessName.model_validate_json(said)


def test_the_first_driver_gets_it_at_once_and_writes_no_fence(run: Run) -> None:
    clock = FakeClock()
    with acquire(run, clock=clock) as lease:
        assert (lease.epoch, lease.lost, clock.now_s) == (1, False, 0.0)
        lease.check()
    assert run.checkpoints().head() == 0


def test_a_driver_that_let_go_is_followed_at_once(run: Run) -> None:
    from_elsewhere(run).release()
    clock = FakeClock()
    with acquire(run, clock=clock) as lease:
        assert (lease.epoch, clock.now_s) == (2, 0.0)


def test_a_driver_whose_heart_beats_is_left_alone_and_named(run: Run) -> None:
    with from_elsewhere(run) as lease:
        told: list[str] = []
        clock = FakeClock(during=lease.beat)
        with pytest.raises(Conflict) as caught:
            acquire(run, clock=clock, tell=told.append)
        assert "process 4711 on node-7" in str(caught.value)
        assert "--take-over" in caught.value.fix
        assert clock.now_s < SILENT_S
        assert "node-7" in told[0]
        lease.beat()
        assert not lease.lost


def test_a_silent_one_is_replaced_after_a_while_of_our_own_clock(run: Run) -> None:
    with from_elsewhere(run) as silent:
        clock = FakeClock()
        with acquire(run, clock=clock) as lease:
            assert lease.epoch == 2
            assert clock.now_s == pytest.approx(SILENT_S, abs=1)
        silent.beat()
        assert silent.lost
        with pytest.raises(Conflict, match="took this run over"):
            silent.check()


def test_one_that_lets_go_while_being_watched_is_followed(run: Run) -> None:
    held = from_elsewhere(run)
    clock = FakeClock(during=held.release)
    with acquire(run, clock=clock) as lease:
        assert lease.epoch == 2
    assert clock.now_s < SILENT_S


def test_a_dead_process_of_this_machine_is_replaced_at_once(run: Run) -> None:
    dead = a_dead_process()
    acquire(run, process=lambda: dead)
    clock = FakeClock()
    with acquire(run, clock=clock) as lease:
        assert (lease.epoch, clock.now_s) == (2, 0.0)


def test_a_living_process_of_this_machine_is_not(run: Run) -> None:
    with acquire(run) as lease, pytest.raises(Conflict, match=f"process {os.getpid()}"):
        acquire(run, clock=FakeClock(during=lease.beat))


def test_a_process_id_that_was_used_again_is_another_process() -> None:
    me = this_process()
    assert not me.is_gone()
    assert me.model_copy(update={"start_ticks": me.start_ticks - 1}).is_gone()
    assert not ELSEWHERE.is_gone(), "nobody here can tell"


def test_the_user_may_take_over_a_living_one(run: Run) -> None:
    with from_elsewhere(run) as lease:
        clock = FakeClock()
        with acquire(run, take_over=True, clock=clock) as mine:
            assert (mine.epoch, clock.now_s) == (2, 0.0)
        lease.beat()
        assert lease.lost


def test_the_replaced_driver_can_commit_nothing_more(run: Run) -> None:
    with from_elsewhere(run) as old:
        checkpoints = run.checkpoints()
        checkpoints.publish(1, "a", {}, {}, Writer(epoch=old.epoch, generation=3))
        with acquire(run, take_over=True) as new:
            with pytest.raises(Conflict):
                checkpoints.publish(2, "b", {}, {}, Writer(epoch=old.epoch, generation=4))
            number = checkpoints.publish(2, "c", {}, {}, Writer(epoch=new.epoch, generation=1)).number
    assert [checkpoints.read(n).is_fence for n in range(1, number + 1)] == [False, True, False]


@pytest.mark.parametrize("seed", range(20))
def test_of_racing_drivers_one_gets_each_epoch(seed: int) -> None:
    run = Run(memory_store(), "r")
    start = Barrier(8, timeout=30)

    def attempt(number: int) -> Lease | None:
        name = ELSEWHERE.model_copy(update={"pid": number})
        start.wait()
        try:
            return acquire(run, process=lambda: name, take_over=seed % 2 == 1, clock=FakeClock())
        except Conflict:
            return None

    with ThreadPoolExecutor(8) as pool:
        held = [lease for lease in pool.map(attempt, range(8), timeout=60) if lease is not None]
    epochs = [lease.epoch for lease in held]
    assert len(set(epochs)) == len(epochs), "each epoch has one driver"
    for lease in held:
        lease.beat()
    assert [lease.epoch for lease in held if not lease.lost] == [max(epochs)]
    for lease in held:
        lease.release()


def test_a_store_out_of_reach_does_not_lose_the_lease(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StorageError("out of reach")

    with from_elsewhere(run) as lease, monkeypatch.context() as patch:
        patch.setattr(Store, "put", fail)
        lease.beat()
        lease.check()
        lease.release()


def test_a_damaged_entry_is_an_unknown_driver_that_may_live(run: Run) -> None:
    with from_elsewhere(run) as lease:
        run.store.put("runs/r/lease/00000001.json", b"{")
        with pytest.raises(Conflict, match="unknown process"):
            acquire(run, clock=FakeClock(during=lease.beat))
        with acquire(run, clock=FakeClock()) as mine:
            assert mine.epoch == 2


def test_the_heart_beats_by_itself(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_EVERY_S", 0.01)
    with from_elsewhere(run), pytest.raises(Conflict):
        acquire(run)
