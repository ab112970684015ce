"""A small process on each node that has imported what a training process needs, and forks them.

A fork takes milliseconds where a new interpreter with torch takes seconds, so a lost worker is replaced
almost at once. It is started as `python -m training.crew.nursery FD PARENT LIFE`, FD being its end of a
stream socket to the keeper, and talks in frames: four bytes of length, then JSON.
A frame that asks for a member carries one more socket, by which that member is spoken to.

    keeper → nursery   {"hire": Spec} + the member's socket
    nursery → keeper   {"up": ...}; {"born": "m3", "pid": 123}; {"ended": "m3", "pid": 123, "code": -9}

Nothing outlives its maker: a member dies with the nursery, the nursery with the keeper, by the kernel's
own signal, which also ends what is stopped. Forking is only sound in a process with a single thread;
where an import has started another one, members are started as processes of their own instead.

Knows neither Ray nor what a member does.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.imports import uncollected
from training.crew.messages import Spec

DEFAULT_LIFE = "training.member:live"
SINGLE_THREADED = {
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
"""Keeps libraries from starting threads while they are imported. What a member may use it sets itself."""
_HEADER_BYTES = 4
_PR_SET_PDEATHSIG = 1
_TIED_WITHIN_S = 10.0


def send_frame(channel: socket.socket, message: dict[str, Any], passed: socket.socket | None = None) -> None:
    """Write one frame to a blocking socket, and pass a socket along with it.

    Raises:
        OSError: the other side is gone.
    """
    body = json.dumps(message).encode()
    header = len(body).to_bytes(_HEADER_BYTES, "big")
    if passed is None:
        channel.sendall(header)
    else:
        socket.send_fds(channel, [header], [passed.fileno()])
    channel.sendall(body)


def receive_frame(channel: socket.socket) -> tuple[dict[str, Any], int | None] | None:
    """Read one frame, and the descriptor that came with it; None at the end.

    Raises:
        OSError: the other side is gone.
    """
    header, fds = b"", array.array("i")
    while len(header) < _HEADER_BYTES:
        more, passed, _, _ = socket.recv_fds(channel, _HEADER_BYTES - len(header), 1)
        fds.extend(passed)
        if not more:
            return None
        header += more
    left = int.from_bytes(header, "big")
    parts = []
    while left:
        part = channel.recv(min(left, 1 << 20))
        if not part:
            return None
        parts.append(part)
        left -= len(part)
    return json.loads(b"".join(parts)), fds[0] if fds else None


def main(arguments: list[str]) -> None:
    """Run until the keeper goes."""
    control_fd, parent_pid, life = int(arguments[0]), int(arguments[1]), arguments[2]
    _die_with(parent_pid)
    # An interrupt from a terminal is the driver's matter; it ends this process by closing the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    control = socket.socket(fileno=control_fd)
    started_s = time.monotonic()
    with uncollected():
        live = _load(life)
    gc.freeze()  # what was imported is never written to by the collector, so its pages stay shared
    threads = _threads()
    took_s = round(time.monotonic() - started_s, 3)
    send_frame(control, {"up": True, "pid": os.getpid(), "threads": threads, "import_s": took_s})
    _Nursery(control, live, life, forks=threads == 1).serve()


class _Nursery:
    def __init__(
        self, control: socket.socket, live: Callable[[socket.socket, Spec], None], life: str, forks: bool
    ) -> None:
        self._control = control
        self._live = live
        self._life = life
        self._forks = forks
        self._children: dict[int, tuple[str, int]] = {}  # descriptor of the process -> member, pid
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)

    def serve(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select():
                    if key.fileobj is self._control:
                        frame = receive_frame(self._control)
                        if frame is None:
                            return
                        self._hire(*frame)
                    else:
                        self._reap(key.fd)
        except OSError:
            return  # the keeper is gone
        finally:
            self._kill_all()

    def _hire(self, message: dict[str, Any], channel_fd: int | None) -> None:
        assert channel_fd is not None, "a request for a member carries its socket"
        spec = Spec.model_validate(message["hire"])
        tied, theirs = os.pipe()
        pid = self._fork(spec, channel_fd, theirs) if self._forks else self._spawn(spec, channel_fd, theirs)
        os.close(theirs)
        os.close(channel_fd)
        # Nobody hears of a member, and so could stop it, before it is bound to end with this process.
        select.select([tied], [], [], _TIED_WITHIN_S)
        os.close(tied)
        process = os.pidfd_open(pid)
        self._children[process] = (spec.member, pid)
        self._selector.register(process, selectors.EVENT_READ)
        send_frame(self._control, {"born": spec.member, "pid": pid})

    def _fork(self, spec: Spec, channel_fd: int, tied: int) -> int:
        nursery_pid = os.getpid()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()
            _die_with(nursery_pid)
            os.close(tied)
            self._selector.close()
            self._control.close()
            for process in self._children:
                os.close(process)
            _begin(self._live, spec, socket.socket(fileno=channel_fd))
            code = 0
        except BaseException:  # noqa: BLE001 - the process's edge; whatever it is, it goes to the log
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)

    def _spawn(self, spec: Spec, channel_fd: int, tied: int) -> int:
        child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "training.crew.nursery",
                "--member",
                str(channel_fd),
                str(os.getpid()),
                self._life,
                str(tied),
            ],
            pass_fds=[channel_fd, tied],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        assert child.stdin is not None
        with child.stdin as to_child, contextlib.suppress(BrokenPipeError):
            to_child.write(spec.model_dump_json().encode())
        child.returncode = 0  # it is reaped here, not by subprocess
        return child.pid

    def _reap(self, process: int) -> None:
        member, pid = self._children.pop(process)
        self._selector.unregister(process)
        os.close(process)
        _, status = os.waitpid(pid, 0)
        send_frame(self._control, {"ended": member, "pid": pid, "code": os.waitstatus_to_exitcode(status)})

    def _kill_all(self) -> None:
        for process, (_, pid) in self._children.items():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _begin(live: Callable[[socket.socket, Spec], None], spec: Spec, channel: socket.socket) -> None:
    """What a new member runs, however it came to be."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(spec.environment)
    sys.path[:0] = [entry for entry in spec.path if entry not in sys.path]
    live(channel, spec)


def _member_main(arguments: list[str]) -> None:
    """A member that wasn't forked: it imports everything anew, and reads its Spec from stdin."""
    channel_fd, parent_pid, life = int(arguments[0]), int(arguments[1]), arguments[2]
    _die_with(parent_pid)
    os.close(int(arguments[3]))
    spec = Spec.model_validate_json(sys.stdin.buffer.read())
    os.environ.update(spec.environment)  # some libraries read theirs while they are imported
    _begin(_load(life), spec, socket.socket(fileno=channel_fd))


def _load(life: str) -> Callable[[socket.socket, Spec], None]:
    module, _, function = life.partition(":")
    live: Callable[[socket.socket, Spec], None] = getattr(importlib.import_module(module), function)
    return live


def _die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when the one that made it is gone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:  # it went before the kernel was told
        os._exit(1)


def _threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


if __name__ == "__main__":
    if sys.argv[1] == "--member":
        _member_main(sys.argv[2:])
    else:
        main(sys.argv[1:])
