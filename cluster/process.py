"""Which process this is, said so that another one can tell whether it still lives.

A process id alone is soon used again, and means nothing in another container. With the kernel's boot
id, the PID namespace and the process's start time it names one process for ever. Where the kernel
doesn't say these (no `/proc`), nobody can tell, and `is_gone` is False.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

from cluster.config import Frozen

_PROC = Path("/proc")
_START_FIELD = 19
"""Of `/proc/PID/stat`, counted after the name: when the process started, in ticks since boot."""
_STATE_FIELD = 0
_DEAD_STATES = ("Z", "X")


class ProcessName(Frozen):
    """One process. `machine` is empty where it can't be told."""

    host: str
    pid: int
    machine: str
    """The kernel's boot id and the PID namespace."""
    start_ticks: int

    def is_gone(self) -> bool:
        """Whether it has certainly ended; False for a process of another machine or container."""
        if not self.machine or self.machine != _machine():
            return False
        stat = _stat(self.pid)
        return stat is None or stat != self.start_ticks

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def this_process() -> ProcessName:
    """The calling process."""
    ticks = _stat(os.getpid())
    machine = _machine() if ticks is not None else ""
    return ProcessName(host=socket.gethostname(), pid=os.getpid(), machine=machine, start_ticks=ticks or 0)


def _machine() -> str:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink(_PROC / 'self/ns/pid')}"
    except OSError:
        return ""


def _stat(pid: int) -> int | None:
    """When a living process started; None where there is none."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold anything
    return None if fields[_STATE_FIELD] in _DEAD_STATES else int(fields[_START_FIELD])
