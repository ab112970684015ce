"""What one training process keeps for its checkpoints: an arena, and the uploader beside it.

Made once per process; generations of the group, and their `Saver`s, come and go around it. The arena is
filled by the training thread, which waits for nothing but the copy; an uploader that dies costs the
checkpoint it was at and is started again for the next.

Knows neither ranks nor manifests.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from pathlib import Path

from cluster.errors import StorageError, shown
from cluster.manifest import FileEntry
from training.checkpoints.arena import Arena, ArenaFile
from training.checkpoints.pieces import Part
from training.checkpoints.uploader import SAYINGS, SLOWDOWN, Source, Trouble, Upload

OnTrouble = Callable[[StorageError], None]
Entries = dict[str, FileEntry]

LOWEST_PRIORITY = 19
_SOURCES = Path(__file__).parents[1]
_ENDED_WITHIN_S = 0.5


class Snapshot:
    """A share as it lies in the arena, until the next one takes its place."""

    def __init__(self, files: tuple[ArenaFile, ...]) -> None:
        self.files = files
        self.is_current = True
        self.upload: Future[Entries] | None = None


class Stage:
    """The arena and the uploader of one process.

    `take` is called by one thread at a time, `upload` by another.
    """

    def __init__(self) -> None:
        self._arena = Arena()
        self._lock = threading.Lock()
        self._uploader: _Uploader | None = None
        self._current: Snapshot | None = None
        self._jobs = 0
        self._is_closed = False

    def prepare(self, size_bytes: int) -> None:
        """Start the uploader and make `size_bytes` of memory exist, aside and with the lowest priority."""

        def work() -> None:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOWEST_PRIORITY)
            with contextlib.suppress(OSError, ValueError):  # no memory: the first snapshot will say so
                self._arena.reserve(size_bytes)
                self._arena.populate()

        with self._lock:
            self._ready()
        if size_bytes > self._arena.size_bytes:
            threading.Thread(target=work, name="arena", daemon=True).start()

    def take(self, parts: Sequence[Part], rank: int, patience_s: float) -> Snapshot:
        """Copy a share into the arena.

        Args:
            patience_s: how long an upload of the snapshot before may still take; then it is abandoned.
        """
        with self._lock:
            before = self._current
        if before is not None and before.upload is not None:
            with contextlib.suppress(Exception):
                before.upload.exception(patience_s)
        with self._lock:
            if before is not None:
                before.is_current = False
                if before.upload is not None:
                    _fail(before.upload, _overtaken())
            self._current = None
        snapshot = Snapshot(self._arena.hold(parts, rank))
        with self._lock:
            self._current = snapshot
        return snapshot

    def upload(
        self,
        snapshot: Snapshot,
        *,
        store: str,
        folder: str,
        retry_s: float,
        calm_s: float,
        mb_per_s: float | None,
        on_trouble: OnTrouble,
    ) -> Future[Entries]:
        """Put a snapshot's files into a store, under `folder/NAME`.

        Args:
            store: its URI.
            retry_s: for how long a store that fails is tried again.
            calm_s: how long it may take for the steps' sake.
            mb_per_s: a limit; without one, what `tell` says of the steps decides.
            on_trouble: told, by a thread, of failures after which it is tried again.

        Returns:
            The files' entries, or a `StorageError`, once it is known.
        """
        done: Future[Entries] = Future()
        with self._lock:
            if self._is_closed or not snapshot.is_current:
                _fail(done, _overtaken())
                return done
            snapshot.upload = done
            self._jobs += 1
            order = Upload(
                job=self._jobs,
                store=store,
                folder=folder,
                files=tuple(
                    Source(name=f.name, offset=f.offset, size_bytes=f.size_bytes) for f in snapshot.files
                ),
                retry_s=retry_s,
                calm_s=calm_s,
                mb_per_s=mb_per_s,
            )
            uploader = self._ready()
        uploader.send(order, done, on_trouble)
        return done

    def tell(self, slowdown: float) -> None:
        """Say what a step took, against a quiet one, while an upload is under way, or `NOBODY_STEPS`.

        Never waits, and does nothing where there is no uploader.
        """
        uploader = self._uploader
        if uploader is not None:
            uploader.tell(slowdown)

    def abandon(self, snapshot: Snapshot) -> None:
        """Let go of a snapshot; an uploader that is still at it is ended."""
        with self._lock:
            snapshot.is_current = False
            if snapshot.upload is None or snapshot.upload.done():
                return
            uploader, self._uploader = self._uploader, None
        _fail(snapshot.upload, _overtaken())
        if uploader is not None:
            uploader.end()

    def close(self) -> None:
        """End the uploader, whatever it is at."""
        with self._lock:
            self._is_closed = True
            uploader, self._uploader = self._uploader, None
        if uploader is not None:
            uploader.end()

    def _ready(self) -> _Uploader:
        if self._uploader is None or self._uploader.is_over:
            self._uploader = _Uploader(self._arena.fd)
        return self._uploader


class _Uploader:
    """The uploader's process as seen from here. A thread starts it, listens to it and reaps it.

    The same thread, because the kernel ends the process with the *thread* that started it.
    """

    def __init__(self, arena_fd: int) -> None:
        self.is_over = False
        self._arena_fd = arena_fd
        self._steps: int | None = None
        self._process: subprocess.Popen[str] | None = None
        self._started = threading.Event()
        self._waiting: dict[int, tuple[Future[Entries], OnTrouble]] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name="uploader", daemon=True)
        self._thread.start()

    def send(self, order: Upload, done: Future[Entries], on_trouble: OnTrouble) -> None:
        """Give an order; the orders before it are dropped. `done` fails if the process is gone."""
        self._started.wait()
        with self._lock:
            for earlier, _ in self._waiting.values():
                _fail(earlier, _overtaken())
            self._waiting = {order.job: (done, on_trouble)}
            is_over = self.is_over
        if is_over:
            self._fail_all("it could not be started, or ended just now")
            return
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # gone: the listener says so
            self._process.stdin.write(order.model_dump_json() + "\n")
            self._process.stdin.flush()

    def tell(self, slowdown: float) -> None:
        """See `Stage.tell`."""
        with self._lock:
            if self._steps is not None:
                with contextlib.suppress(OSError):  # full, or nobody reads any more
                    os.write(self._steps, SLOWDOWN.pack(slowdown))

    def end(self) -> None:
        """Kill the process; it has nothing to lose."""
        self._started.wait()
        if self._process is not None:
            self._process.kill()
        self._thread.join(_ENDED_WITHIN_S)

    def _listen(self) -> None:
        try:
            self._start()
            assert self._process is not None
            assert self._process.stdout is not None
            for line in self._process.stdout:
                self._heed(line)
            why = f"it ended with status {self._process.wait()}"
        except (OSError, ValueError) as error:
            why = shown(str(error))
            if self._process is not None:
                self._process.kill()
                self._process.wait()
        finally:
            with self._lock:
                self.is_over = True
                steps, self._steps = self._steps, None
            if steps is not None:
                os.close(steps)
            self._started.set()
        self._fail_all(why)
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    pipe.close()  # type: ignore[union-attr]

    def _start(self) -> None:
        path = os.pathsep.join(p for p in (str(_SOURCES), os.environ.get("PYTHONPATH")) if p)
        command = [sys.executable, "-m", "training.checkpoints.uploader"]
        command += ["--arena", str(self._arena_fd), "--parent", str(os.getpid())]
        read, self._steps = os.pipe()
        os.set_blocking(self._steps, False)
        try:
            self._process = subprocess.Popen(
                [*command, "--steps", str(read)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=(self._arena_fd, read),
                env={**os.environ, "PYTHONPATH": path},
            )
        finally:
            os.close(read)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, LOWEST_PRIORITY)
        self._started.set()

    def _heed(self, line: str) -> None:
        saying = SAYINGS.validate_json(line)
        with self._lock:
            done, on_trouble = self._waiting.get(saying.job, (None, None))
            is_over = not isinstance(saying, Trouble) or saying.is_final
            if is_over:
                self._waiting.pop(saying.job, None)
        if done is None or on_trouble is None:
            return  # of an order that was dropped
        if not isinstance(saying, Trouble):
            with contextlib.suppress(InvalidStateError):  # abandoned just now
                done.set_result(saying.entries)
        elif is_over:
            _fail(done, saying.error)
        else:
            on_trouble(saying.error)

    def _fail_all(self, why: str) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for done, _ in waiting.values():
            _fail(
                done,
                StorageError(
                    "the process that uploads checkpoints is gone",
                    got=why,
                    fix="nothing: the next checkpoint starts another; see whether memory is short",
                ),
            )


def _fail(done: Future[Entries], error: StorageError) -> None:
    with contextlib.suppress(InvalidStateError):  # it has ended already
        done.set_exception(error)


def _overtaken() -> StorageError:
    return StorageError(
        "a checkpoint was given up for a newer one",
        got="its files were not in the store by then",
        fix="save less often, or raise checkpoint.upload_mb_per_s",
    )
