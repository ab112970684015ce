"""Commands under measurement: every line they write stamped, and nothing of theirs left behind.

Every process of a command carries a mark in its environment, because a Ray's daemons and workers leave
the tree of processes below the command that started them. Time stamps are of the monotonic clock, which
all processes of a machine share. Knows nothing of what is run.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import psutil

from tests.bench.machine import REPO

MARK = "TANDEM_BENCH_COMMAND"
ENDS_WITHIN_S = 300.0
_GONE_WITHIN_S = 10.0
_LOOK_EVERY_S = 0.02
_TAIL_CHARS = 3000


class Broken(Exception):
    """A command that failed or took too long; the text holds the end of what it said."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line that a command wrote."""

    at_s: float
    """`time.monotonic()` when it was read."""
    text: str


class Command:
    """A running command. Made by `running_command`."""

    def __init__(self, arguments: Sequence[str], variables: Mapping[str, str]) -> None:
        self.arguments = list(arguments)
        self.out: list[Line] = []
        self.err: list[Line] = []
        self.mark = secrets.token_hex(8)
        self.started_s = time.monotonic()
        self.child = subprocess.Popen(
            self.arguments,
            cwd=REPO,
            env={**os.environ, **variables, MARK: self.mark},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._readers = [
            threading.Thread(target=_read, args=(pipe, lines), daemon=True)
            for pipe, lines in ((self.child.stdout, self.out), (self.child.stderr, self.err))
        ]
        for reader in self._readers:
            reader.start()

    def until(self, done: Callable[[], bool], within_s: float, what: str) -> None:
        """Wait until `done` says so, looking every 20 ms.

        Raises:
            Broken: the command ended before, or it took too long.
        """
        give_up_s = time.monotonic() + within_s
        while not done():
            if self.child.poll() is not None and not done():
                raise self.broken(f"ended with {self.child.returncode} before {what}")
            if time.monotonic() > give_up_s:
                raise self.broken(f"took more than {within_s:.0f} s for {what}")
            time.sleep(_LOOK_EVERY_S)

    def result(self, within_s: float = ENDS_WITHIN_S) -> dict[str, Any]:
        """Wait until it ended: the JSON object on the last line that it wrote to stdout.

        Raises:
            Broken: it failed, or took too long.
        """
        try:
            code = self.child.wait(within_s)
        except subprocess.TimeoutExpired:
            raise self.broken(f"did not end within {within_s:.0f} s") from None
        for reader in self._readers:
            reader.join(_GONE_WITHIN_S)
        if code != 0 or not self.out:
            raise self.broken(f"ended with {code}")
        found: dict[str, Any] = json.loads(self.out[-1].text)
        return found

    def broken(self, why: str) -> Broken:
        """An error with the end of what the command said."""
        said = "\n".join(line.text for line in [*self.out[-5:], *self.err])
        return Broken(f"{' '.join(self.arguments)} {why}\n{said[-_TAIL_CHARS:]}")

    def stop(self) -> None:
        """SIGTERM, so that it cleans up; then SIGKILL to whatever it left."""
        if self.child.poll() is None:
            self.child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.child.wait(_GONE_WITHIN_S)
        end_marked(MARK, self.mark)
        self.child.wait(_GONE_WITHIN_S)


@contextlib.contextmanager
def running_command(arguments: Sequence[str], variables: Mapping[str, str]) -> Iterator[Command]:
    """A command in the repository's root, `variables` laid over its environment; ended with the `with`."""
    command = Command(arguments, variables)
    try:
        yield command
    finally:
        command.stop()


def end_marked(name: str, value: str) -> None:
    """SIGKILL to every living process with this variable in its environment."""
    left = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # gone, or not ours to look at
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                process.kill()
                left.append(process)
    psutil.wait_procs(left, timeout=_GONE_WITHIN_S)


def _read(pipe: IO[bytes] | None, lines: list[Line]) -> None:
    assert pipe is not None
    for raw in pipe:
        lines.append(Line(time.monotonic(), raw.decode(errors="replace").rstrip("\n")))
