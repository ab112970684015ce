"""The process beside a trainer that puts its snapshots into the store.

It maps the trainer's arena (the file descriptor is inherited), takes orders as JSON
lines on stdin and answers on stdout. Per file: SHA-256, then a put, several files at once. A failing
store is tried again until the order's deadline, with pauses that grow and differ, and each failure is
told. It ends with its trainer: at the end of stdin, and by the kernel's signal if that is held open.

A process and not a thread, because hashing and sending hold Python's lock now and then, which a step
would feel, and because a process can be given a lower priority. It imports no torch.

What keeps steps undisturbed: see `training.checkpoints.stage`, which starts it.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import math
import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pydantic import Field, TypeAdapter

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.config import Frozen
from cluster.errors import StorageError, TandemError
from cluster.manifest import FileEntry
from cluster.retry import retried
from cluster.storage import Deadlines, Store, open_store

FILES_AT_ONCE = 3
_PR_SET_PDEATHSIG = 1
_FIRST_REQUEST_S = 30.0
_LONGEST_REQUEST_S = 240.0
_TOLD_EVERY_S = 10.0
_BYTES_PER_MB = 1_000_000
_QUIET_MB_PER_S = 60.0
"""Where steps need every core. 2 ranks on 2 shared, busy cores, 1.26 GB of state, step time while uploading
against a quiet step, p95: no priority, no limit 3.9; lowest priority, no limit 1.4 to 1.5; and 60 MB/s 0.9
(one run each; the machine was loaded by others, so only the order of these can be trusted)."""
_IN_THE_WAY = 2


class Source(Frozen):
    """Where in the arena a file's bytes are."""

    name: str
    offset: int = Field(ge=0)
    size_bytes: int = Field(ge=0)


class Upload(Frozen):
    """Put files under `folder/NAME`. A later order takes the place of one that is not done."""

    job: int
    store: str
    """The store's URI."""
    folder: str
    files: tuple[Source, ...]
    retry_s: float
    mb_per_s: float | None


class Uploaded(Frozen):
    """All files of an order are in the store."""

    saying: Literal["uploaded"] = "uploaded"
    job: int
    entries: dict[str, FileEntry]


class Trouble(Frozen):
    """A put failed; it is tried again if `is_final` is not set, else the order is given up."""

    saying: Literal["trouble"] = "trouble"
    job: int
    is_final: bool
    failed: str
    got: str
    allowed: str
    fix: str

    @classmethod
    def of(cls, job: int, error: TandemError, *, is_final: bool) -> Trouble:
        return cls(
            job=job,
            is_final=is_final,
            failed=error.failed,
            got=error.got,
            allowed=error.allowed,
            fix=error.fix,
        )

    @property
    def error(self) -> StorageError:
        return StorageError(self.failed, got=self.got, allowed=self.allowed, fix=self.fix)


SAYINGS: TypeAdapter[Uploaded | Trouble] = TypeAdapter(Uploaded | Trouble)


class Abandoned(Exception):
    """A later order has taken this one's place."""


class Pace:
    """Spreads bytes over time: each file starts when those before it should have gone.

    A file itself goes as fast as it can, so a limit holds over files, not within one.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._free_s = clock.monotonic_s()

    def wait_for(self, size_bytes: int, mb_per_s: float | None, give_up: Callable[[], bool]) -> None:
        """Return when `size_bytes` more may go; at once without a limit.

        Raises:
            Abandoned: `give_up` said so meanwhile.
        """
        if mb_per_s is None:
            return
        with self._lock:
            start_s = max(self._free_s, self._clock.monotonic_s())
            self._free_s = start_s + size_bytes / (mb_per_s * _BYTES_PER_MB)
        while (left_s := start_s - self._clock.monotonic_s()) > 0:
            if give_up():
                raise Abandoned
            self._clock.sleep(min(left_s, 0.2))


def _ran_and_waited_ns() -> tuple[int, int]:
    """How long this thread has run, and how long it was kept from running; zeros where that is unknown."""
    try:
        ran, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
    except (OSError, ValueError):
        return 0, 0
    return int(ran), int(waited)


class Order:
    """One order while it is carried out."""

    def __init__(
        self, order: Upload, arena: memoryview, say: Callable[[Frozen], None], clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._order = order
        self._arena = arena
        self._say = say
        self._clock = clock
        self._pace = Pace(clock)
        self._deadline_s = clock.monotonic_s() + order.retry_s
        self._is_over = threading.Event()
        self._failure: TandemError | None = None
        self._stores: dict[float, Store] = {}
        self._lock = threading.Lock()
        self._quiet_until_s = -math.inf

    def abandon(self) -> None:
        """Begin no other request; whatever is under way is of no interest."""
        self._is_over.set()

    def run(self) -> None:
        """Put all the files, and say how it ended; say nothing if the order was abandoned."""
        try:
            with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
                entries = list(pool.map(self._put, self._order.files))
        except Abandoned:
            if self._failure is not None:
                self._say(Trouble.of(self._order.job, self._failure, is_final=True))
            return
        names = [source.name for source in self._order.files]
        self._say(Uploaded(job=self._order.job, entries=dict(zip(names, entries, strict=True))))

    def _put(self, source: Source) -> FileEntry:
        key = f"{self._order.folder}/{source.name}"
        data = self._arena[source.offset : source.offset + source.size_bytes]
        before = _ran_and_waited_ns()
        digest = hashlib.sha256(data).hexdigest()
        ran_ns, waited_ns = (now - then for now, then in zip(_ran_and_waited_ns(), before, strict=True))
        # With the lowest priority, whoever waits this long is in the way of the steps.
        is_in_the_way = waited_ns > _IN_THE_WAY * ran_ns
        limit = self._order.mb_per_s or (_QUIET_MB_PER_S if is_in_the_way else None)
        self._pace.wait_for(source.size_bytes, limit, self._is_over.is_set)
        request_s = _FIRST_REQUEST_S

        def put() -> None:
            nonlocal request_s
            if self._is_over.is_set():
                raise Abandoned
            # A slow line needs more time; a dead one shouldn't be given it at first.
            store = self._store(request_s)
            request_s = min(2 * request_s, _LONGEST_REQUEST_S)
            store.put(key, data)

        left_s = self._deadline_s - self._clock.monotonic_s()
        try:
            retried(put, transient=self._is_worth_another_try, retry_s=max(left_s, 0), clock=self._clock)
        except TandemError as error:
            self._failure = self._failure or error
            self.abandon()  # the other files are of no use then
            raise Abandoned from error
        return FileEntry(key=key, size_bytes=source.size_bytes, sha256=digest)

    def _store(self, request_s: float) -> Store:
        with self._lock:
            if request_s not in self._stores:
                deadlines = Deadlines(request_s=request_s, retry_s=0)
                self._stores[request_s] = open_store(self._order.store, deadlines)
            return self._stores[request_s]

    def _is_worth_another_try(self, error: Exception) -> bool:
        """Whatever the store says: a full disk may be cleared and a right granted before the deadline."""
        if not isinstance(error, StorageError):
            return False
        with self._lock:
            now_s = self._clock.monotonic_s()
            is_news = now_s >= self._quiet_until_s
            if is_news:
                self._quiet_until_s = now_s + _TOLD_EVERY_S
        if is_news:
            self._say(Trouble.of(self._order.job, error, is_final=False))
        return True


def serve(arena_fd: int, orders: Iterable[str], say: Callable[[Frozen], None]) -> None:
    """Carry out orders, one JSON line each, until there are no more."""
    current: Order | None = None
    for line in orders:
        order = Upload.model_validate_json(line)
        if current is not None:
            current.abandon()
        arena = memoryview(mmap.mmap(arena_fd, 0, prot=mmap.PROT_READ))
        current = Order(order, arena, say)
        threading.Thread(target=current.run, name=f"upload-{order.job}", daemon=True).start()


def end_with(parent: int) -> None:
    """Have the kernel end this process when the thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(0)


def main() -> None:
    """What `python -m training.checkpoints.uploader --arena FD --parent PID` does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--arena", type=int, required=True, help="file descriptor of the arena")
    parser.add_argument("--parent", type=int, required=True, help="process to end with")
    arguments = parser.parse_args()
    end_with(arguments.parent)
    # Signals that a terminal or a platform sends to the whole group: the trainer may want a last save.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    writing = threading.Lock()

    def say(saying: Frozen) -> None:
        try:
            with writing:
                sys.stdout.write(saying.model_dump_json() + "\n")
                sys.stdout.flush()
        except OSError:  # nobody listens any more
            os._exit(0)

    serve(arguments.arena, sys.stdin, say)
    os._exit(0)  # whatever is under way is of no interest


if __name__ == "__main__":
    main()
