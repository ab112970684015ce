"""Which checkpoints are kept, and that nothing anybody may still need is ever deleted."""

from __future__ import annotations

import random
from collections.abc import Callable
from hashlib import sha256

import pytest

from cluster.attempts import Attempt
from cluster.errors import Conflict, NotFound, StorageError
from cluster.manifest import FileEntry, Manifest, Writer, read_file
from cluster.pins import Pins
from cluster.runs import Run
from cluster.storage import Store, memory_store
from training.checkpoints.retention import Retention
from training.recipe import Checkpointing

ME = Writer(epoch=2, generation=1)
OLDER = Writer(epoch=1, generation=7)


@pytest.fixture
def run() -> Run:
    return Run(memory_store(), "r")


class Trainer:
    """Commits checkpoints as a saver does: files first, under the attempt's name, then the manifest."""

    def __init__(self, run: Run, writer: Writer = ME) -> None:
        self.run = run
        self.writer = writer
        self.turn = 0
        self.newest = run.checkpoints().head()

    def upload(self, number: int | None = None) -> tuple[str, dict[str, FileEntry]]:
        """The files of an attempt, and nothing that names them."""
        name = Attempt(self.writer, self.turn, "ab12").name
        self.turn += 1
        folder = self.run.checkpoints().folder(number or self.newest + 1, name)
        entries = {}
        for file in ("model", "optimizer"):
            self.run.store.put(f"{folder}/{file}", file.encode())
            digest = sha256(file.encode()).hexdigest()
            entries[file] = FileEntry(key=f"{folder}/{file}", size_bytes=len(file), sha256=digest)
        return name, entries

    def commit(self, loss: float | None = None) -> Manifest:
        name, entries = self.upload()
        meta = {"step": self.newest, "loss": loss}
        manifest = self.run.checkpoints().publish(self.newest + 1, name, entries, meta, self.writer)
        self.newest = manifest.number
        return manifest


def whole(run: Run) -> list[int]:
    """The checkpoints whose files can all be read."""
    found = []
    artifacts = run.checkpoints()
    for number in range(1, artifacts.head() + 1):
        manifest = artifacts.read(number)
        try:
            for name in manifest.files:
                read_file(run.store, manifest, name)
        except NotFound:
            continue
        if not manifest.is_fence:
            found.append(number)
    return found


def files(run: Run) -> list[str]:
    return [key for key in run.store.keys("runs/r/checkpoints") if not key.endswith("manifest.json")]


def policy(keep: int, keep_best: int = 0) -> Checkpointing:
    return Checkpointing(keep=keep, keep_best=keep_best)


def test_the_newest_stay_and_the_manifests_of_all(run: Run) -> None:
    trainer, retention = Trainer(run), Retention(run, policy(2))
    gone = [retention.after_commit(trainer.commit()) for _ in range(5)]
    assert gone == [[], [], [1], [2], [3]]
    assert whole(run) == [4, 5]
    assert len(files(run)) == 4
    assert run.checkpoints().read(1).files, "the record stays"


def test_the_best_stay_too_and_ties_go_to_the_newer(run: Run) -> None:
    trainer, retention = Trainer(run), Retention(run, policy(1, keep_best=2))
    for loss in (3.0, 1.0, 2.0, None, 1.0, 5.0, 4.0):
        retention.after_commit(trainer.commit(loss))
    assert whole(run) == [2, 5, 7]


def test_without_losses_nothing_is_best(run: Run) -> None:
    trainer, retention = Trainer(run), Retention(run, policy(1, keep_best=3))
    for _ in range(4):
        retention.after_commit(trainer.commit())
    assert whole(run) == [4]


def test_fences_do_not_count_as_checkpoints(run: Run) -> None:
    older = Trainer(run, OLDER)
    older.commit()
    older.commit()
    run.checkpoints().fence(ME)
    Retention(run, policy(3)).after_commit(Trainer(run).commit())
    assert whole(run) == [1, 2, 4]


def test_what_is_pinned_or_exported_is_never_deleted(run: Run) -> None:
    trainer, retention = Trainer(run), Retention(run, policy(1))
    for number in range(1, 8):
        manifest = trainer.commit()
        if number == 2:
            Pins(run).add(2)
        if number == 4:
            run.servables().commit(1, {"model.onnx": b"m"}, {"run": "r", "checkpoint": 4})
        retention.after_commit(manifest)
    assert whole(run) == [2, 4, 7]
    Pins(run).remove(2)
    Pins(run).remove(2)
    retention.after_commit(trainer.commit())
    assert whole(run) == [4, 8]


def test_what_is_gone_or_never_was_cannot_be_pinned(run: Run) -> None:
    trainer, retention = Trainer(run), Retention(run, policy(1))
    for _ in range(3):
        retention.after_commit(trainer.commit())
    run.checkpoints().fence(Writer(epoch=3, generation=0))
    for number in (0, 1, 4, 9):
        with pytest.raises(NotFound):
            Pins(run).add(number)
    assert Pins(run).numbers() == set()


def test_a_servable_that_cannot_be_read_stops_all_deleting(run: Run) -> None:
    trainer, retention = Trainer(run), Retention(run, policy(1))
    run.servables().commit(1, {}, {"checkpoint": 1})
    retention.after_commit(trainer.commit())
    run.store.put(run.servables().key(1), b"{}")
    fresh = Retention(run, policy(1))
    assert fresh.after_commit(trainer.commit()) == []
    assert whole(run) == [1, 2]


def failing(monkeypatch: pytest.MonkeyPatch, fails: Callable[[str], bool]) -> None:
    delete = Store.delete

    def broken(self: Store, keys: list[str]) -> None:
        if any(fails(key) for key in keys):
            raise StorageError("deleting failed", got="503")
        delete(self, keys)

    monkeypatch.setattr(Store, "delete", broken)


@pytest.mark.parametrize("fresh", [False, True], ids=["same process", "new process"])
def test_a_delete_that_failed_is_caught_up(run: Run, monkeypatch: pytest.MonkeyPatch, fresh: bool) -> None:
    trainer, retention = Trainer(run), Retention(run, policy(1))
    with monkeypatch.context() as patch:
        failing(patch, lambda key: key.endswith("optimizer"))
        assert [retention.after_commit(trainer.commit()) for _ in range(3)] == [[], [], []]
    retention = Retention(run, policy(1)) if fresh else retention
    assert retention.after_commit(trainer.commit()) == [1, 2, 3]
    assert len(files(run)) == 2


def test_what_attempts_left_behind_is_swept_once_they_are_over(run: Run) -> None:
    zombie, trainer = Trainer(run, OLDER), Trainer(run)
    zombie.upload()
    zombie.upload()
    trainer.upload()  # an upload of our own that was given up
    Retention(run, policy(3)).after_commit(trainer.commit())
    assert whole(run) == [1]
    assert len(files(run)) == 2


def test_what_may_still_become_a_checkpoint_is_left_alone(run: Run) -> None:
    trainer = Trainer(run)
    newer = Trainer(run, Writer(epoch=2, generation=2))
    name, entries = newer.upload()  # for number 1, which the older writer is faster to take
    manifest = trainer.commit()
    later = trainer.upload(number=1)  # a rank that did not hear of number 1 yet
    ahead = trainer.upload()
    unnamed = "runs/r/checkpoints/00000001/0f3a/model"
    run.store.put(unnamed, b"by a release that names attempts otherwise")
    Retention(run, policy(1)).after_commit(manifest)
    for key in (*later[1].values(), *ahead[1].values()):
        assert run.store.size_bytes(key.key) is not None
    assert run.store.size_bytes(unnamed) is not None
    assert run.checkpoints().publish(1, name, entries, {}, newer.writer).number == 2
    assert whole(run) == [1, 2]


def test_an_old_driver_that_wakes_deletes_nothing_of_the_new_one(run: Run) -> None:
    old = Trainer(run, OLDER)
    manifests = [old.commit() for _ in range(3)]
    asleep = Retention(run, policy(1))
    asleep.after_commit(manifests[1])
    run.checkpoints().fence(ME)
    new = Trainer(run)
    kept = [new.commit().number for _ in range(2)]
    asleep.after_commit(manifests[2])
    assert set(kept) <= set(whole(run))


def test_files_of_an_attempt_that_moved_on_to_a_later_number_are_its_checkpoints(run: Run) -> None:
    trainer, zombie = Trainer(run), Trainer(run, OLDER)
    name, entries = trainer.upload()
    zombie.commit()
    manifest = run.checkpoints().publish(1, name, entries, {}, ME)
    assert manifest.number == 2
    trainer.newest = 2
    fresh = Retention(run, policy(2))
    assert fresh.after_commit(manifest) == []
    assert whole(run) == [1, 2]
    assert fresh.after_commit(trainer.commit()) == [1]
    assert Retention(run, policy(1)).after_commit(trainer.commit()) == [2, 3]
    assert whole(run) == [4]


@pytest.mark.parametrize("seed", range(30))
def test_whatever_happens_the_newest_stay_whole(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writers that die, sleep and wake, and deletes that fail, in a random order."""
    rng = random.Random(seed)
    run = Run(memory_store(), "r")
    keep = rng.randint(1, 3)
    failing(monkeypatch, lambda key: rng.random() < 0.1)
    writers = [Trainer(run, Writer(epoch=1, generation=0))]
    cleaners = [Retention(run, policy(keep))]
    for _ in range(60):
        at = rng.randrange(len(writers))
        trainer = writers[at]
        happens = rng.random()
        if happens < 0.15:
            trainer.upload()
        elif happens < 0.25:
            following = Writer(epoch=1, generation=max(w.writer.generation for w in writers) + 1)
            writers.append(Trainer(run, following))
            cleaners.append(Retention(run, policy(keep)))
        else:
            try:
                manifest = trainer.commit()
            except Conflict:
                continue
            cleaners[at].after_commit(manifest)
        kept = whole(run)
        checkpoints = range(1, run.checkpoints().head() + 1)
        assert kept[-keep:] == list(checkpoints)[-keep:], "the newest are whole"
