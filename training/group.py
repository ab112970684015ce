"""One generation of workers as a process group: formed, used, and taken apart however it ended.

A group is formed round a key-value store that rank 0 serves. Unlike `torch.distributed`'s own way of
starting, the same process can be in one group after another, under another rank.

Knows nothing of what the group computes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import (
    PrefixStore,
    Store,
    TCPStore,
)  # torch.distributed's own, where they are typed
from torch.distributed.rendezvous import rendezvous

from cluster.clock import Clock

JOINED_WITHIN_S = 60.0
ALONE_PATIENCE_S = 1800.0
"""Without a supervisor, who would see a hang earlier."""


@dataclass(frozen=True)
class Group:
    """This process's place in a generation. Alone (`world` 1), there is no store and no process group."""

    rank: int
    world: int
    generation: int
    attempt: str
    """Names the generation in events and in the ledger; the same on every rank."""
    store: Store | None
    host: str = "127.0.0.1"
    """Where the other ranks reach rank 0's machine."""

    def client(self) -> Store | None:
        """A connection of its own to the group's store, for one thread's use."""
        return None if self.store is None else self.store.clone()  # type: ignore[attr-defined]

    def meet(self) -> None:
        """Wait for the other ranks: what one may still ask of rank 0's store, it asks before.

        Raises:
            RuntimeError: one of them is gone.
        """
        if self.store is not None:
            dist.barrier()


def host_store(world: int) -> TCPStore:
    """Rank 0's store, on a port that the system chooses (`.port`)."""
    return TCPStore("localhost", 0, world, is_master=True, wait_for_workers=False)


def reach_store(host: str, port: int, world: int) -> TCPStore:
    """The store that rank 0 hosts.

    Raises:
        RuntimeError: it isn't there.
    """
    return TCPStore(
        host, port, world, is_master=False, timeout=timedelta(seconds=JOINED_WITHIN_S), wait_for_workers=False
    )


class Bond:
    """This process's membership in one process group. Make it before the group's store is reached."""

    def __init__(self) -> None:
        self._before = open_sockets()
        self._sockets: set[int] | None = None

    def form(self, group: Group, device: torch.device, patience_s: float) -> None:
        """Form the process group with the others.

        Args:
            patience_s: how long one exchange may take, before it fails by itself.

        Raises:
            RuntimeError: not everyone came, or someone has gone again.
        """
        if group.store is not None:
            group.store.set_timeout(timedelta(seconds=JOINED_WITHIN_S))
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=group.store,
                rank=group.rank,
                world_size=group.world,
                timeout=timedelta(seconds=patience_s),
            )
        self._sockets = open_sockets() - self._before

    def abort(self) -> None:
        """Make whatever waits in an exchange fail, from any thread. A peer that is cut off closes nothing.

        Gloo's own abort leaves a wait that has begun as it is (torch 2.13), so its connections are cut; while
        the group is being formed, all that were opened since.
        """
        forming = self._sockets is None
        cut(open_sockets() - self._before if forming else self._sockets or set())
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError, ValueError):
                dist.distributed_c10d._get_default_group().abort()

    def dissolve(self) -> None:
        """Leave the process group, whole or broken, so that another can be formed."""
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError, ValueError):  # half gone, perhaps: so it is left
                dist.destroy_process_group()


def cut(connections: set[int]) -> None:
    """Shut these sockets down, but for those that only listen; whoever waits in one finds it at its end."""
    for number in connections:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as connection:
            if not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                connection.shutdown(socket.SHUT_RDWR)


def open_sockets() -> set[int]:
    """The file descriptors of this process's sockets."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                found.add(int(name))
    return found


@contextlib.contextmanager
def from_environment(device: torch.device, clock: Clock) -> Iterator[Group]:
    """The one group of a process that has formed it already, or that was started with RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT set, as torchrun does it; otherwise a group of one.

    Raises:
        RuntimeError: not everyone came.
    """
    rank, world, store = 0, 1, None
    formed = dist.is_initialized()
    if formed:
        rank, world = dist.get_rank(), dist.get_world_size()
        store = PrefixStore("tandem", dist.distributed_c10d._get_default_store())
    elif "WORLD_SIZE" in os.environ:
        store, rank, world = next(rendezvous("env://"))
    named = f"{clock.wall():%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
    if store is not None and world > 1:
        if rank == 0:
            store.set("attempt", named)
        named = store.get("attempt").decode()
    group = Group(rank, world, 0, named, store if world > 1 else None)
    if formed:
        yield group
        return
    bond = Bond()
    try:
        bond.form(group, device, ALONE_PATIENCE_S)
        yield group
    finally:
        bond.dissolve()
