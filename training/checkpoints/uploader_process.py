"""The uploader's process as its trainer sees it: started, given orders, listened to, reaped.

Knows nothing of the arena but its file descriptor, nor which of its snapshots is current
(`training.checkpoints.stage`).
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from pathlib import Path

from cluster.errors import StorageError, shown
from cluster.manifest import FileEntry
from training.checkpoints.orders import SAYINGS, SLOWDOWN, Trouble, Upload

OnTrouble = Callable[[StorageError], None]
Entries = dict[str, FileEntry]

LOWEST_PRIORITY = 19
_SOURCES = Path(__file__).parents[2]
_ENDED_WITHIN_S = 0.5


class UploaderProcess:
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
                failed(earlier, overtaken())
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
        """See `training.checkpoints.stage.Stage.tell`."""
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
            failed(done, saying.error)
        else:
            on_trouble(saying.error)

    def _fail_all(self, why: str) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for done, _ in waiting.values():
            failed(
                done,
                StorageError(
                    "the process that uploads checkpoints is gone",
                    got=why,
                    fix="nothing: the next checkpoint starts another; see whether memory is short",
                ),
            )


def failed(done: Future[Entries], error: StorageError) -> None:
    """Have an upload end with an error, if it has not ended yet."""
    with contextlib.suppress(InvalidStateError):  # it has ended already
        done.set_exception(error)


def overtaken() -> StorageError:
    """What is said of an upload that was dropped."""
    return StorageError(
        "a checkpoint was given up for a newer one",
        got="its files were not in the store by then",
        fix="save less often, or raise checkpoint.upload_mb_per_s",
    )
