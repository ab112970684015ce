"""Servers as subprocesses: started, waited for, paused while others are measured, ended whole.

Every process of a server carries a mark in its environment, because a Ray's daemons leave the tree
of processes below the command that started them.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import psutil

MARK = "TANDEM_BENCH_SERVER"
STOP_WITHIN_S = 60
POLL_S = 0.2
LOG_TAIL_LINES = 20


class NotStarted(Exception):
    """A server ended, or wasn't ready in time; the text holds the end of its output."""


class Server:
    """A running server. Made by `running`."""

    def __init__(self, child: subprocess.Popen[bytes], mark: str) -> None:
        self._child = child
        self._mark = mark

    def processes(self) -> list[psutil.Process]:
        """Every living process of the server, in no order."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def pause(self) -> None:
        """Stop every process where it is, so that an idle server takes nothing from a measured one."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()

    def resume(self) -> None:
        """Let it go on."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def stop(self) -> None:
        """SIGTERM to the first process; after it ended, or after 60 s, SIGKILL to what is left."""
        self.resume()
        self._child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(STOP_WITHIN_S)
        left = self.processes()
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)
        self._child.wait(5)

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:  # gone, or not ours to look at
            return False


@contextlib.contextmanager
def running(
    command: Sequence[str], *, env: Mapping[str, str], ready: Callable[[], bool], within_s: float
) -> Iterator[Server]:
    """A server, from when it is ready until the end of the `with`.

    Args:
        env: its whole environment.
        ready: asked every 0.2 s.

    Raises:
        NotStarted: it ended before it was ready, or wasn't ready within `within_s`.
    """
    mark = secrets.token_hex(8)
    with tempfile.TemporaryFile("w+b") as log:
        child = subprocess.Popen(
            command,
            env={**env, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        server = Server(child, mark)
        try:
            deadline_s = time.monotonic() + within_s
            while not ready():
                ended = child.poll()
                if ended is not None or time.monotonic() > deadline_s:
                    why = f"ended with {ended}" if ended is not None else f"was not ready in {within_s:.0f} s"
                    log.seek(0)
                    tail = log.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]
                    raise NotStarted("\n".join([f"{command[0]} {why}", *tail]))
                time.sleep(POLL_S)
            yield server
        finally:
            server.stop()


def free_port() -> int:
    """A TCP port that is free on the loopback interface now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
