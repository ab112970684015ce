"""A Ray of several nodes on this machine, of which a test may lose one: its processes die at once, unasked.

    with RayNodes() as nodes:
        node = nodes.add(cpus=1)
        nodes.lose(node)

The head offers no CPUs, so workers are on the others, and the driver's node is the head. All ask for a token.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from cluster.clock import SYSTEM_CLOCK
from cluster.connection import _environment

TESTS = Path(__file__).parent
_OBJECT_STORE_BYTES = 100 << 20
_GONE_WITHIN_S = 10.0
_ANSWER_S = 10.0


class RayNodes:
    """The head, and nodes as they are added; all are gone at the end."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._cluster: Any = None

    def __enter__(self) -> Self:
        folder = tempfile.mkdtemp(prefix="n")  # short: Ray's sockets lie below it
        self._stack.callback(shutil.rmtree, folder, ignore_errors=True)
        self.env = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_urlsafe(32),
            "RAY_TMPDIR": folder,
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        """What a driver must have in its environment."""
        self._stack.enter_context(_environment(self.env))
        from ray.cluster_utils import Cluster

        # Its nodes aren't tied to this process by Ray's own means, which take over its signals.
        self._cluster = Cluster(shutdown_at_exit=False)
        self._stack.callback(self._end)
        self._add(num_cpus=0, include_dashboard=False, no_monitor=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def address(self) -> str:
        """Of the head."""
        return str(self._cluster.address)

    def add(self, cpus: int = 1) -> str:
        """Start another node; its id."""
        return str(self._add(num_cpus=cpus).node_id)

    def lose(self, node_id: str) -> None:
        """Kill a node: its raylet, and every process on it."""
        node = next(node for node in self._cluster.worker_nodes if node.node_id == node_id)
        self._kill(node)
        self._cluster.worker_nodes.remove(node)

    def lose_all(self) -> None:
        """Kill every node but the head."""
        for node in list(self._cluster.worker_nodes):
            self.lose(node.node_id)

    def lose_head(self) -> None:
        """Kill the head. The other nodes are left to themselves until the end."""
        self._cluster.global_state.disconnect()
        self._kill(self._cluster.head_node)
        self._cluster.head_node = None

    def drain(self, node_id: str, deadline_s: float) -> None:
        """Tell Ray that a node is going to be taken away: what a cloud's notice leads to."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        accepted, why = GcsClient(address=self.address).drain_node(
            node_id,
            autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "a test's notice",
            int((SYSTEM_CLOCK.wall().timestamp() + deadline_s) * 1000),
            timeout=_ANSWER_S,
        )
        assert accepted, why

    def pids(self, node_id: str) -> set[int]:
        """Of every process on a node."""
        node = next(node for node in self._cluster.worker_nodes if node.node_id == node_id)
        return {process.pid for process in _tree(node)}

    def _add(self, **settings: Any) -> Any:
        return self._cluster.add_node(object_store_memory=_OBJECT_STORE_BYTES, **settings)

    def _kill(self, node: Any) -> None:
        processes = _tree(node)
        for process in processes:  # the raylet first, so that it starts nothing anew
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        give_up_s = time.monotonic() + _GONE_WITHIN_S
        while any(map(_lives, processes)):
            assert time.monotonic() < give_up_s, "a killed process is still there"
            time.sleep(0.05)

    def _end(self) -> None:
        for node in self._cluster.list_all_nodes():
            self._kill(node)
        self._cluster.worker_nodes.clear()
        self._cluster.head_node = None
        with contextlib.suppress(Exception):
            self._cluster.global_state.disconnect()


def _tree(node: Any) -> list[psutil.Process]:
    """Of a node: what Ray started for it, and all that these started."""
    roots = [info.process.pid for infos in node.all_processes.values() for info in infos]
    found: dict[int, psutil.Process] = {}
    for pid in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(pid)
            found |= {p.pid: p for p in [root, *root.children(recursive=True)]}
    return list(found.values())


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
