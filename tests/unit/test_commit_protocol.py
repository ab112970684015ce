"""The commit protocol under thousands of random schedules: writers, crashes, zombies, lost answers, clean-up.

The real `Artifacts` and `Retention`, on a store of which every call is a point where another process may
go on, this one may die or fall asleep for long, and the call fail before or after its work is done. One
process runs at a time, and which one follows from the seed: a schedule that fails, fails again.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from functools import partial
from hashlib import sha256
from typing import Any

import pytest

from cluster.artifacts import Artifacts
from cluster.attempts import Attempt
from cluster.errors import Conflict, NotFound, StorageError
from cluster.manifest import FileEntry, Manifest, Writer, read_file
from cluster.runs import Run
from cluster.storage import Store
from training.checkpoints.retention import Retention
from training.recipe import Checkpointing

SCHEDULES = 2_000
BATCHES = 8
DRIVERS = 4
SAVES = 3
FILES = ("model", "optimizer")


class Died(BaseException):
    """The process was killed."""


class Processes:
    """Threads of which one runs at a time, and hands over at `point`."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self._turns: list[threading.Lock] = []
        self._ready: list[int] = []
        self._over = threading.Event()
        self._mine = threading.local()
        self.unexpected: list[BaseException] = []

    def add(self, body: Callable[[], None]) -> None:
        turn = threading.Lock()
        turn.acquire()
        number = len(self._turns)
        self._turns.append(turn)
        self._ready.append(number)

        def work() -> None:
            self._mine.number = number
            turn.acquire()
            try:
                body()
            except (Died, Conflict):
                pass
            except BaseException as error:
                self.unexpected.append(error)
            self._ready.remove(number)
            self._pass_on()

        threading.Thread(target=work, daemon=True).start()

    def run(self) -> None:
        self._pass_on()
        assert self._over.wait(60)

    def point(self) -> None:
        """Where another process may run."""
        chosen = self.random.choice(self._ready)
        if chosen != self._mine.number:
            self._turns[chosen].release()
            self._turns[self._mine.number].acquire()

    def _pass_on(self) -> None:
        if self._ready:
            self._turns[self.random.choice(self._ready)].release()
        else:
            self._over.set()


class SharedStore(Store):
    """What all processes see. `calls` wraps each call; None for a look from outside."""

    def __init__(self, objects: dict[str, bytes], call: Callable[[Callable[[], Any]], Any] | None) -> None:
        self._objects = objects
        self._call = call or (lambda work: work())
        self.uri = "memory://"

    def get(self, key: str) -> bytes:
        def work() -> bytes:
            if key not in self._objects:
                raise NotFound(key)
            return self._objects[key]

        return self._call(work)

    def size_bytes(self, key: str) -> int | None:
        return self._call(lambda: len(self._objects[key]) if key in self._objects else None)

    def put(self, key: str, data: Any) -> None:
        self._call(lambda: self._objects.__setitem__(key, bytes(data)))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        return self._call(lambda: self._objects.setdefault(key, data) == data)

    def keys(self, prefix: str) -> list[str]:
        return self._call(lambda: sorted(key for key in self._objects if key.startswith(prefix)))

    def folders(self, prefix: str) -> list[str]:
        below = prefix + "/"
        names = {key.removeprefix(below).partition("/")[0] for key in self.keys(below)}
        return sorted(names)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._call(lambda key=key: self._objects.pop(key, None))


class Schedule:
    """Drivers of one run that follow one another, whether or not the one before is dead."""

    def __init__(self, seed: int) -> None:
        self.objects: dict[str, bytes] = {}
        self.processes = Processes(seed)
        self.random = self.processes.random
        self.keep = self.random.randint(1, 3)
        self.acknowledged: list[Manifest] = []
        for epoch in range(1, DRIVERS + 1):
            self.processes.add(lambda epoch=epoch: self.drive(epoch))  # type: ignore[misc]

    def call(self, work: Callable[[], Any]) -> Any:
        """One call to the store: it may be delayed, fail, lose its answer, or be the process's last."""
        happens = self.random.random()
        self.processes.point()
        if happens < 0.01:
            raise Died
        if happens < 0.03:
            raise StorageError("failed", got="503")
        done = work()
        if happens < 0.05:
            raise StorageError("the answer was lost", got="reset")
        if happens < 0.06:
            raise Died
        return done

    def drive(self, epoch: int) -> None:
        run = Run(SharedStore(self.objects, self.call), "r")
        artifacts = run.checkpoints()
        writer = Writer(epoch=epoch, generation=0)
        newest = self.tried(lambda: artifacts.fence(writer), 50).number
        self.tried(lambda: load(artifacts), 50)
        retention = Retention(run, Checkpointing(keep=self.keep, keep_best=self.random.randint(0, 1)))
        for turn in range(SAVES):
            attempt = Attempt(writer, turn, "a").name
            meta = {"step": turn, "attempt": attempt, "loss": self.random.random()}
            try:
                entries = {name: self.upload(run, newest + 1, attempt, name) for name in FILES}
                publish = partial(artifacts.publish, newest + 1, attempt, entries, meta, writer)
                manifest = self.tried(publish, self.random.randint(1, 3))
            except StorageError:
                continue  # a checkpoint is given up, the run goes on
            self.acknowledged.append(manifest)
            newest = manifest.number
            retention.after_commit(manifest)

    @staticmethod
    def tried(work: Callable[[], Any], times: int) -> Any:
        """What `work` gives, at the last of so many attempts."""
        for left in reversed(range(times)):
            try:
                return work()
            except StorageError:
                if not left:
                    raise
        raise AssertionError("unreachable")

    @staticmethod
    def upload(run: Run, number: int, attempt: str, name: str) -> FileEntry:
        data = content(attempt, name)
        key = f"{run.checkpoints().folder(number, attempt)}/{name}"
        run.store.put(key, data)
        return FileEntry(key=key, size_bytes=len(data), sha256=sha256(data).hexdigest())


def content(attempt: str, name: str) -> bytes:
    return f"{name} of {attempt}".encode()


def load(artifacts: Artifacts) -> Manifest | None:
    """Load as a run that starts does; what is loaded must be one attempt's."""

    def read(manifest: Manifest) -> Manifest:
        for name in FILES:
            assert artifacts.read_file(manifest, name) == content(manifest.meta["attempt"], name)
        return manifest

    found = artifacts.newest(read, lambda number, error: None)
    return found[0] if found else None


def check(schedule: Schedule) -> None:
    """What must hold when all is over, seen by someone to whom nothing happens."""
    assert schedule.processes.unexpected == []
    store = SharedStore(schedule.objects, None)
    artifacts = Run(store, "r").checkpoints()
    entries = [artifacts.read(number) for number in range(1, artifacts.head() + 1)]
    newest_fence = Writer(epoch=0, generation=0)
    for entry in entries:
        assert entry.writer is not None
        assert entry.writer >= newest_fence, f"entry {entry.number} stands behind a newer writer's fence"
        if entry.is_fence:
            newest_fence = entry.writer
    checkpoints = [entry for entry in entries if not entry.is_fence]
    nonces = [entry.nonce for entry in checkpoints]
    assert len(set(nonces)) == len(nonces), "no attempt stands twice"
    for manifest in schedule.acknowledged:
        assert artifacts.read(manifest.number) == manifest, "what was acknowledged stands"
    for manifest in checkpoints[-schedule.keep :]:
        for name in FILES:
            assert read_file(store, manifest, name) == content(manifest.nonce, name), "the newest are whole"
    assert load(artifacts) == (checkpoints[-1] if checkpoints else None)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_no_schedule_breaks_the_protocol(batch: int) -> None:
    committed = deaths = 0
    for seed in range(batch, SCHEDULES, BATCHES):
        schedule = Schedule(seed)
        schedule.processes.run()
        try:
            check(schedule)
        except AssertionError as error:
            raise AssertionError(f"schedule {seed}: {error}") from error
        committed += len(schedule.acknowledged)
        deaths += len(schedule.acknowledged) < DRIVERS * SAVES
    assert committed > SCHEDULES / BATCHES, "the schedules do commit"
    assert deaths, "and are disturbed"
