"""One actor on each node: it has a nursery, and carries messages between members and the coordinator.

It starts its nursery as soon as it exists, so that torch is being imported while the recipe is still being
checked and Ray Train places workers. Members talk to it by sockets; it talks to the coordinator by actor
calls, one under way at a time in each direction, so that nothing is overtaken. It decides nothing.

If the coordinator is gone, or can't be reached for `LOST_S`, the keeper kills its members: somebody else
may have replaced them by then. If the keeper is gone, the kernel does (`training.crew.nursery`).

Knows Ray; never imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from training.crew.nursery import SINGLE_THREADED, receive_frame, send_frame

HEARTBEAT_S = 1.0
LOST_S = 30.0
_MAX_LINE_BYTES = 16 << 20
_GATHER_S = 0.002
"""What is said within so short a time travels together."""


class Keeper:
    """An asyncio actor, pinned to its node.

    Args:
        node: the id of the node it is on.
        life: what members live by, as `module:function`.
    """

    def __init__(self, node: str, life: str) -> None:
        self._node = node
        self._control, theirs = socket.socketpair()
        with theirs:
            self._nursery = subprocess.Popen(
                [sys.executable, "-m", "training.crew.nursery", str(theirs.fileno()), str(os.getpid()), life],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **SINGLE_THREADED, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        self._orders_out = ThreadPoolExecutor(1, "nursery")
        self._members: dict[str, _Line] = {}
        self._said: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
        self._over = asyncio.Event()

    async def work(self, coordinator: Any) -> None:
        """Carry messages until the coordinator wants no more of them, or is gone.

        Args:
            coordinator: the handle of a `training.crew.coordinator.Coordinator`.
        """
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._listen_to_nursery, args=(loop,), name="nursery", daemon=True).start()
        try:
            await self._report(coordinator)
        finally:
            # Without its keeper the nursery kills its members, and ends.
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)
            await asyncio.to_thread(self._nursery.wait, 10)

    async def do(self, orders: list[tuple[Any, ...]]) -> None:
        """Carry out orders of the coordinator, in their order.

        Args:
            orders: `("hire", member, spec)`, `("tell", member, line)` or `("kill", member)`.
        """
        for what, member, *rest in orders:
            if what == "hire":
                await self._hire(member, rest[0])
            elif what == "tell":
                line = self._members.get(member)
                if line is not None:
                    line.send(rest[0])
            elif what == "kill":
                line = self._members.get(member)
                if line is not None:
                    line.kill()
        await asyncio.sleep(0)

    async def _hire(self, member: str, spec: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair()
        spec = {**spec, "path": tuple(entry for entry in sys.path if entry)}
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_MAX_LINE_BYTES)
        self._members[member] = _Line(member, reader, writer, self._said, oom_kills())
        self._orders_out.submit(_pass, self._control, {"hire": spec}, theirs)

    async def _report(self, coordinator: Any) -> None:
        """Tell the coordinator what was said, and once a second that there is nothing to tell."""
        while not self._over.is_set():
            batch = []
            with contextlib.suppress(TimeoutError):
                batch.append(await asyncio.wait_for(self._said.get(), HEARTBEAT_S))
                await asyncio.sleep(_GATHER_S)
            while not self._said.empty():
                batch.append(self._said.get_nowait())
            stay = await asyncio.wait_for(coordinator.hear.remote(self._node, os.getpid(), batch), LOST_S)
            if not stay:
                return

    def _listen_to_nursery(self, loop: asyncio.AbstractEventLoop) -> None:
        with contextlib.suppress(OSError):
            while frame := receive_frame(self._control):
                loop.call_soon_threadsafe(self._heard_of_nursery, frame[0])
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(self._nursery_ended)

    def _heard_of_nursery(self, frame: dict[str, Any]) -> None:
        if "up" in frame:
            self._said.put_nowait(("up", frame))
        elif "born" in frame:
            line = self._members.get(frame["born"])
            if line is not None:
                line.born(frame["pid"])
            self._said.put_nowait(("born", frame["born"], frame["pid"]))
        elif "ended" in frame:
            line = self._members.pop(frame["ended"], None)
            out_of_memory = bool(
                line and frame["code"] == -signal.SIGKILL and not line.killed and oom_kills() > line.oom_kills
            )
            if line is not None:
                # What it said before it ended has to arrive before its end does.
                line.close_after(("ended", frame["ended"], frame["code"], out_of_memory))

    def _nursery_ended(self) -> None:
        """Its members died with it. The coordinator takes this keeper for lost, and gets another one."""
        self._over.set()
        self._said.put_nowait(("nursery-lost",))


class _Line:
    """What connects a keeper to one member."""

    def __init__(
        self,
        member: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        said: asyncio.Queue[tuple[Any, ...]],
        kills: int,
    ) -> None:
        self._member = member
        self._writer = writer
        self._said = said
        self._pid: int | None = None
        self._last: tuple[Any, ...] | None = None
        self.killed = False
        self.oom_kills = kills
        self._task = asyncio.create_task(self._read(reader))

    def born(self, pid: int) -> None:
        self._pid = pid
        if self.killed:
            self.kill()

    def send(self, line: bytes) -> None:
        self._writer.write(line)

    def kill(self) -> None:
        self.killed = True
        if self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def close_after(self, last: tuple[Any, ...]) -> None:
        self._last = last
        if self._task.done():
            self._said.put_nowait(last)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                self._said.put_nowait(("said", self._member, line))
        except (OSError, ValueError):
            pass  # it was killed in the middle of a line
        finally:
            self._writer.close()
            if self._last is not None:
                self._said.put_nowait(self._last)


def oom_kills() -> int:
    """How many processes were killed so far for want of memory, as this process's cgroup counts them."""
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files = [f"/sys/fs/cgroup{path}/memory.events", "/sys/fs/cgroup/memory.events"]
        elif "memory" in controllers.split(","):
            folder = "/sys/fs/cgroup/memory"
            files = [f"{folder}{path}/memory.oom_control", f"{folder}/memory.oom_control"]
        else:
            continue
        for name in files:
            for counter in _read(name).splitlines():
                if counter.startswith("oom_kill "):
                    return int(counter.split()[1])
    # Without a memory cgroup: of the whole machine.
    counters = (line.split() for line in _read("/proc/vmstat").splitlines())
    return next((int(count) for name, count in counters if name == "oom_kill"), 0)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _pass(control: socket.socket, message: dict[str, Any], theirs: socket.socket) -> None:
    with theirs, contextlib.suppress(OSError):  # a nursery that is gone is noticed by its reader
        send_frame(control, message, theirs)
