"""The process beside a trainer that puts its snapshots into the store.

It maps the trainer's arena (the file descriptor is inherited), takes orders as JSON
lines on stdin and answers on stdout. Per file: SHA-256, then a put, several files at once. A failing
store is tried again until the order's deadline, with pauses that grow and differ, and each failure is
told. It ends with its trainer: at the end of stdin, and by the kernel's signal if that is held open.

A process and not a thread, because hashing and sending hold Python's lock now and then, which a step
would feel, and because a process can be given a lower priority. It imports no torch.

What keeps steps undisturbed: files are hashed, and written where the store is a directory, by threads that
run only where a core is idle, at a pace that follows what the trainer tells of its steps
(`training.checkpoints.throttle`). Where that would not end in time, and for what a client of a server does,
it is the lowest priority (19) instead, which `training.checkpoints.uploader_process` gives it.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import math
import mmap
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.config import Frozen
from cluster.errors import StorageError, TandemError
from cluster.manifest import FileEntry
from cluster.retry import retried
from cluster.storage import Deadlines, Store, memory_store, open_store
from training.checkpoints.orders import Source, Steps, Trouble, Upload, Uploaded
from training.checkpoints.throttle import NOBODY_STEPS, Throttle

FILES_AT_ONCE = 3
_PR_SET_PDEATHSIG = 1
_FIRST_REQUEST_S = 30.0
_LONGEST_REQUEST_S = 240.0
_TOLD_EVERY_S = 10.0
_LOOK_EVERY_S = 0.1


class Abandoned(Exception):
    """A later order has taken this one's place."""


class Order:
    """One order while it is carried out. `throttle` and `heard` are the process's, one order's at a time."""

    def __init__(
        self,
        order: Upload,
        arena: memoryview,
        say: Callable[[Frozen], None],
        throttle: Throttle,
        heard: Callable[[], Iterable[float]],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._order = order
        self._arena = arena
        self._say = say
        self._throttle = throttle
        self._heard = heard
        self._clock = clock
        self._deadline_s = clock.monotonic_s() + order.retry_s
        self._is_over = threading.Event()
        self._slots = threading.Semaphore(FILES_AT_ONCE)
        self._failure: TandemError | None = None
        self._stores: dict[float, Store] = {}
        self._lock = threading.Lock()
        self._quiet_until_s = -math.inf

    def abandon(self) -> None:
        """Begin no other request; whatever is under way is of no interest."""
        self._is_over.set()

    def run(self) -> None:
        """Put all the files, and say how it ended; say nothing if the order was abandoned.

        Returns soon after it was abandoned, though a request may still be under way.
        """
        before = list(self._heard())  # of steps that nothing was uploaded in: they say nothing of the rate
        self._throttle.begin(
            sum(source.size_bytes for source in self._order.files),
            now_s=self._clock.monotonic_s(),
            within_s=self._order.calm_s,
            mb_per_s=self._order.mb_per_s,
        )
        if before and before[-1] == NOBODY_STEPS:
            self._throttle.heard(NOBODY_STEPS)
        try:
            puts = [self._begin(source) for source in self._order.files]
            entries = [self._ended(put) for put in puts]
        except Abandoned:
            if self._failure is not None:
                self._say(Trouble.of(self._order.job, self._failure, is_final=True))
            return
        names = [source.name for source in self._order.files]
        self._say(Uploaded(job=self._order.job, entries=dict(zip(names, entries, strict=True))))

    def _begin(self, source: Source) -> Future[FileEntry]:
        """Start to put a file when its turn has come.

        Each in a thread of its own, since a thread that has taken the idle priority may not leave it again.
        """
        while not self._slots.acquire(timeout=_LOOK_EVERY_S):
            self._look()
        self._look()
        while (left_s := self._throttle.start_s(now_s := self._clock.monotonic_s()) - now_s) > 0:
            self._is_over.wait(min(left_s, _LOOK_EVERY_S))
            self._look()
        is_late = self._throttle.is_late(now_s)
        self._throttle.goes(source.size_bytes, now_s)
        done: Future[FileEntry] = Future()

        def work() -> None:
            if not is_late:
                _let_everyone_else_go_first()
            try:
                done.set_result(self._put(source))
            except BaseException as error:  # noqa: BLE001 - a thread's edge: raised by whoever waits
                done.set_exception(error)
            finally:
                self._slots.release()

        threading.Thread(target=work, name=source.name, daemon=True).start()
        return done

    def _ended(self, put: Future[FileEntry]) -> FileEntry:
        while True:
            self._look()
            with contextlib.suppress(FutureTimeoutError):
                return put.result(_LOOK_EVERY_S)

    def _look(self) -> None:
        """What else has happened: steps, and the order's end."""
        for slowdown in self._heard():
            self._throttle.heard(slowdown)
        if self._is_over.is_set():
            raise Abandoned

    def _put(self, source: Source) -> FileEntry:
        key = f"{self._order.folder}/{source.name}"
        data = self._arena[source.offset : source.offset + source.size_bytes]
        digest = hashlib.sha256(data).hexdigest()
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


def serve(arena_fd: int, orders: Iterable[str], say: Callable[[Frozen], None], steps: Steps) -> None:
    """Carry out orders, one JSON line each, until there are no more."""
    throttle = Throttle()
    current: Order | None = None
    thread: threading.Thread | None = None
    for line in orders:
        order = Upload.model_validate_json(line)
        if current is not None and thread is not None:
            current.abandon()
            thread.join()
        arena = memoryview(mmap.mmap(arena_fd, 0, prot=mmap.PROT_READ))
        current = Order(order, arena, say, throttle, steps.heard)
        thread = threading.Thread(target=current.run, name=f"upload-{order.job}", daemon=True)
        thread.start()


def _let_everyone_else_go_first() -> None:
    """Have this thread run only where a core has nothing else to do."""
    with contextlib.suppress(AttributeError, OSError):  # not Linux, or not allowed
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def end_with(parent: int) -> None:
    """Have the kernel end this process when the thread that started it ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before we asked
        os._exit(0)


def main() -> None:
    """What `python -m training.checkpoints.uploader --arena FD --parent PID` does."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--arena", type=int, required=True, help="file descriptor of the arena")
    parser.add_argument("--steps", type=int, required=True, help="file descriptor of the pipe of steps")
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

    # The client's threads begin here, with this process's priority: begun by an idle thread, they would be
    # idle for ever, and requests would run into their deadlines on a busy machine.
    memory_store().size_bytes("none")
    serve(arguments.arena, sys.stdin, say, Steps(arguments.steps))
    os._exit(0)  # whatever is under way is of no interest


if __name__ == "__main__":
    main()
