"""Savers of one group in one process: real uploaders, a real key-value store, a real directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed import TCPStore

from cluster.errors import Conflict, Damaged, StorageError, TandemError
from cluster.manifest import Manifest, Writer
from cluster.runs import Run
from cluster.storage import open_store
from training.checkpoints.checkpoint import CheckpointMeta, restore, restore_model
from training.checkpoints.saver import Saver, Stage
from training.loop import TrainState
from training.recipe import Checkpointing

WITHIN_S = 30.0
FIRST = Writer(epoch=1, generation=0)
PATIENT = Checkpointing(retry_s=WITHIN_S)


class Told:
    """What one rank's saver said."""

    def __init__(self) -> None:
        self.committed: list[Manifest] = []
        self.failed: list[TandemError] = []
        self.troubles: list[TandemError] = []
        self.troubled = threading.Event()

    def on_trouble(self, error: TandemError) -> None:
        self.troubles.append(error)
        self.troubled.set()


class Member:
    """One rank: a state, a stage and a saver."""

    def __init__(
        self,
        stage: Stage,
        store: Path,
        *,
        rank: int = 0,
        world: int = 1,
        exchange: TCPStore | None = None,
        newest: int = 0,
        policy: Checkpointing = PATIENT,
        writer: Writer = FIRST,
    ) -> None:
        self.told = Told()
        self.state = trained(seed=0)
        self.run = Run(open_store(str(store)), "r")
        self.saver = Saver(
            self.run,
            self.state,
            policy,
            rank=rank,
            world=world,
            exchange=exchange,
            newest=newest,
            writer=writer,
            on_commit=self.told.committed.append,
            on_failure=self.told.failed.append,
            stage=stage,
            on_trouble=self.told.on_trouble,
        )


def trained(seed: int, tied: bool = False) -> TrainState:
    """A state one step old, with a buffer of integers and tensors of every rank."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 7))
    if tied:
        model.append(torch.nn.Linear(7, 7))
        model[3].weight = model[2].weight
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 5)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return TrainState(model, optimizer, step=1, cursor=4)


def fresh(tied: bool = False) -> TrainState:
    """Another state of the same form, whose optimizer has nothing yet."""
    state = trained(seed=99, tied=tied)
    state.optimizer.state.clear()
    state.step = state.cursor = 0
    return state


def at(step: int) -> CheckpointMeta:
    return CheckpointMeta(step=step, cursor=4 * step, fingerprint="f", ledger=())


def assert_same(one: TrainState, other: TrainState) -> None:
    theirs = other.model.state_dict()
    assert one.model.state_dict().keys() == theirs.keys()
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    for mine, their in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert one.optimizer.state[mine].keys() == other.optimizer.state[their].keys()
        for key, value in one.optimizer.state[mine].items():
            assert torch.equal(value, other.optimizer.state[their][key])


def refused(number: int, error: Exception) -> None:
    pytest.fail(f"checkpoint {number} was passed over: {error}")


@pytest.fixture(scope="module")
def stages() -> Iterator[list[Stage]]:
    made = [Stage(), Stage()]
    yield made
    for stage in made:
        stage.close()


@pytest.fixture
def group(stages: list[Stage], tmp_path: Path) -> Iterator[list[Member]]:
    """Two ranks that have a store in common."""
    server = TCPStore(
        "localhost", 0, 2, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=WITHIN_S)
    )
    members = [
        Member(stages[rank], tmp_path / "store", rank=rank, world=2, exchange=server.clone())
        for rank in (0, 1)
    ]
    yield members
    for member in members:
        member.saver.close()


def save_all(members: list[Member], step: int) -> list[Exception | None]:
    """Save on every rank and wait for it; what `wait` raised, by rank."""

    def one(member: Member) -> Exception | None:
        member.saver.save(at(step))
        try:
            member.saver.wait(WITHIN_S)
        except (StorageError, Conflict) as error:
            return error
        return None

    with ThreadPoolExecutor(len(members)) as pool:
        return list(pool.map(one, members))


def until(happened: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + WITHIN_S
    while not happened():
        assert time.monotonic() < give_up_s
        time.sleep(0.005)


def uploader_of(stage: Stage) -> psutil.Process:
    uploader = stage._uploader
    assert uploader is not None
    uploader._started.wait(WITHIN_S)
    assert uploader._process is not None
    return psutil.Process(uploader._process.pid)


def test_one_rank_saves_and_restores(stages: list[Stage], tmp_path: Path) -> None:
    member = Member(stages[0], tmp_path)
    assert save_all([member], 1) == [None]
    assert not member.saver.busy
    manifest = member.told.committed[0]
    assert manifest.number == 1
    assert manifest.writer == Writer(epoch=1, generation=0)
    assert set(manifest.files) == {
        "layout.json",
        "model-00000-000.safetensors",
        "optimizer-00000-000.safetensors",
    }
    other = fresh()
    found = restore(other, member.run.checkpoints(), refused)
    assert found is not None
    assert (found.number, found.head, found.meta) == (1, 1, at(1))
    assert (other.step, other.cursor) == (1, 4)
    assert_same(member.state, other)
    member.saver.close()


def test_tied_weights_stay_tied(stages: list[Stage], tmp_path: Path) -> None:
    member = Member(stages[0], tmp_path)
    member.saver.state = trained(seed=0, tied=True)
    assert save_all([member], 1) == [None]
    other = fresh(tied=True)
    restore(other, member.run.checkpoints(), refused)
    assert_same(member.saver.state, other)
    assert other.model[3].weight is other.model[2].weight
    member.saver.close()


def test_two_ranks_save_a_share_each(group: list[Member]) -> None:
    assert save_all(group, 1) == [None, None]
    assert save_all(group, 2) == [None, None]
    first, second = group[0].told.committed
    assert (first.number, second.number) == (1, 2)
    assert group[1].told.committed == []
    assert {name.split("-")[1] for name in second.files if "-" in name} == {"00000", "00001"}
    other = fresh()
    found = restore(other, group[0].run.checkpoints(), refused)
    assert found is not None
    assert found.number == 2
    assert_same(group[0].state, other)


def test_the_model_alone_can_be_restored(group: list[Member]) -> None:
    assert save_all(group, 1) == [None, None]
    run = group[0].run
    manifest = run.checkpoints().read(1)
    run.store.delete(entry.key for name, entry in manifest.files.items() if name.startswith("optimizer"))
    other = fresh()
    assert restore_model(other.model, run.checkpoints(), refused) is not None
    for name, tensor in group[0].state.model.state_dict().items():
        assert torch.equal(tensor, other.model.state_dict()[name])


@pytest.mark.parametrize("harm", ["truncated", "flipped", "lost", "layout"])
def test_a_damaged_checkpoint_is_passed_over(group: list[Member], tmp_path: Path, harm: str) -> None:
    save_all(group, 1)
    with torch.no_grad():
        for member in group:
            member.state.model[0].weight.zero_()
    save_all(group, 2)
    name = "layout.json" if harm == "layout" else "optimizer-00001-000.safetensors"
    entry = group[0].told.committed[1].files[name]
    path = tmp_path / "store" / entry.key
    data = bytearray(path.read_bytes())
    if harm == "lost":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(data[:-1])
    else:
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    passed: list[int] = []
    other = fresh()
    found = restore(other, group[0].run.checkpoints(), lambda number, error: passed.append(number))
    assert found is not None
    assert (found.number, found.head, passed) == (1, 2, [2])
    assert other.model[0].weight.abs().sum() > 0


def test_no_whole_checkpoint_is_not_a_beginning(stages: list[Stage], tmp_path: Path) -> None:
    member = Member(stages[0], tmp_path)
    assert restore(fresh(), member.run.checkpoints(), refused) is None
    save_all([member], 1)
    member.run.store.delete(entry.key for entry in member.told.committed[0].files.values())
    with pytest.raises(Damaged, match="no checkpoint of the run is whole"):
        restore(fresh(), member.run.checkpoints(), lambda number, error: None)
    member.saver.close()


def test_a_checkpoint_of_another_model_is_told_as_such(stages: list[Stage], tmp_path: Path) -> None:
    member = Member(stages[0], tmp_path)
    save_all([member], 1)
    other = fresh()
    other.model.append(torch.nn.Linear(7, 2))
    told: list[Exception] = []
    with pytest.raises(Damaged):
        restore(other, member.run.checkpoints(), lambda number, error: told.append(error))
    assert "not those of this model" in str(told[0])
    assert "model/3." in str(told[0])
    member.saver.close()


def test_a_killed_uploader_costs_one_checkpoint(group: list[Member], stages: list[Stage]) -> None:
    save_all(group, 1)
    victim = uploader_of(stages[1])
    victim.send_signal(signal.SIGSTOP)  # so that it is killed in the middle of an order
    for member in group:
        member.saver.save(at(2))
    until(lambda: group[1].saver._snapshot is not None and group[1].saver._snapshot.upload is not None)
    victim.kill()
    for member in group:
        with pytest.raises(StorageError, match="the process that uploads checkpoints is gone"):
            member.saver.wait(WITHIN_S)
        assert len(member.told.failed) == 1
        assert not member.saver.busy
    assert save_all(group, 3) == [None, None]
    assert [manifest.meta["step"] for manifest in group[0].told.committed] == [1, 3]
    assert uploader_of(stages[1]).pid != victim.pid


def test_one_rank_without_a_store_is_heard_by_all(stages: list[Stage], tmp_path: Path) -> None:
    server = TCPStore("localhost", 0, 2, is_master=True, wait_for_workers=False)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "runs").write_text("in the way")
    short = Checkpointing(retry_s=0.2)
    members = [
        Member(stages[0], tmp_path / "good", rank=0, world=2, exchange=server.clone(), policy=PATIENT),
        Member(stages[1], tmp_path / "bad", rank=1, world=2, exchange=server.clone(), policy=short),
    ]
    errors = save_all(members, 1)
    assert all(isinstance(error, StorageError) and "bad" in str(error) for error in errors)
    assert [len(member.told.failed) for member in members] == [1, 1]
    assert members[1].told.troubles
    assert members[0].run.checkpoints().head() == 0
    (tmp_path / "bad" / "runs").unlink()
    members[1].run = members[0].run
    members[1].saver._run = members[0].run  # its disk is mended
    assert save_all(members, 2) == [None, None]
    for member in members:
        member.saver.close()


def test_a_store_that_recovers_is_waited_for(stages: list[Stage], tmp_path: Path) -> None:
    obstacle = tmp_path / "runs"
    obstacle.write_text("in the way")
    member = Member(stages[0], tmp_path)
    member.saver.save(at(1))
    assert member.told.troubled.wait(WITHIN_S)
    assert member.saver.busy
    with pytest.raises(StorageError, match="not committed yet") as impatient:
        member.saver.wait(0)
    assert any(trouble.failed in impatient.value.got for trouble in member.told.troubles), "why is told"
    obstacle.unlink()
    member.saver.wait(WITHIN_S)
    assert [manifest.number for manifest in member.told.committed] == [1]
    assert member.told.failed == []
    member.saver.close()


def test_a_newer_writer_ends_the_older_one(stages: list[Stage], tmp_path: Path) -> None:
    older = Member(stages[0], tmp_path, writer=Writer(epoch=1, generation=5))
    newer = Member(stages[1], tmp_path, writer=Writer(epoch=2, generation=0))
    assert save_all([newer], 1) == [None]
    (error,) = save_all([older], 9)
    assert isinstance(error, Conflict)
    with pytest.raises(Conflict):
        older.saver.save(at(10))
    # And the other way round: what an older one committed meanwhile is no hindrance.
    late = Member(stages[0], tmp_path, newest=0, writer=Writer(epoch=3, generation=0))
    assert save_all([late], 2) == [None]
    assert late.told.committed[0].number == 2
    for member in (older, newer, late):
        member.saver.close()


def test_closing_waits_for_nobody(group: list[Member], stages: list[Stage]) -> None:
    group[0].saver.save(at(1))  # the other rank never saves
    began_s = time.monotonic()
    group[0].saver.close()
    assert time.monotonic() - began_s < 5  # not a measurement: it would be 30 s and more
    assert group[0].told.failed == []
    # The stage serves the next generation, of another size.
    alone = Member(stages[0], Path(group[0].run.store.uri.removeprefix("file://")))
    assert save_all([alone], 2) == [None]
    alone.saver.close()


def test_a_newer_snapshot_takes_the_place_of_one_that_is_stuck(
    stages: list[Stage], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.checkpoints.saver._PATIENCE_S", 0.1)
    obstacle = tmp_path / "runs"
    obstacle.write_text("in the way")
    member = Member(stages[0], tmp_path)
    member.saver.save(at(1))
    assert member.told.troubled.wait(WITHIN_S)
    member.state.model[0].weight.data.fill_(2.0)
    member.saver.save(at(2))
    obstacle.unlink()
    member.saver.wait(WITHIN_S)
    assert [error.failed for error in member.told.failed] == ["a checkpoint was given up for a newer one"]
    assert [manifest.meta["step"] for manifest in member.told.committed] == [2]
    other = fresh()
    restore(other, member.run.checkpoints(), refused)
    assert torch.all(other.model[0].weight == 2.0)
    member.saver.close()


def test_the_uploader_ends_with_its_trainer() -> None:
    """A trainer that is killed closes nothing and says nothing."""
    script = """
import sys, time
from training.checkpoints.stage import Stage
stage = Stage()
stage.prepare(4096)
stage._uploader._started.wait(30)
print(stage._uploader._process.pid, flush=True)
time.sleep(60)
"""
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None
    uploader = psutil.Process(int(trainer.stdout.readline()))
    trainer.kill()
    trainer.wait(WITHIN_S)
    trainer.stdout.close()
    psutil.wait_procs([uploader], WITHIN_S)
    assert not uploader.is_running() or uploader.status() == psutil.STATUS_ZOMBIE


def test_the_uploader_finds_the_sources_that_its_trainer_has(stages: list[Stage]) -> None:
    """Wherever it is started, and whether or not they are installed."""
    stages[0].prepare(4096)
    first = Path(uploader_of(stages[0]).environ()["PYTHONPATH"].split(os.pathsep)[0])
    assert (first / "training" / "checkpoints" / "uploader.py").is_file()


def test_the_uploader_is_light_and_modest(stages: list[Stage]) -> None:
    stages[0].prepare(4096)
    process = uploader_of(stages[0])
    assert process.nice() == 19
    code = "import sys, training.checkpoints.uploader; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=dict(os.environ)).returncode == 0
