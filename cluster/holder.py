"""The process that holds a local Ray: starts it, waits until it isn't wanted, leaves nothing behind.

`python -m cluster.holder RECORD PARENT_PID` (0: not tied to a parent) runs in a session of its own.
It ends at SIGTERM, when a process of Ray's dies under it, or when the parent it is tied to is gone,
however that died. Because it outlives its parent, a SIGKILL of the user's process orphans nothing.

Ray is started through the two classes that `ray start` and `ray.cluster_utils.Cluster` use.
`ray start` itself opens a Ray Client server on a fixed port, and `ray.init` gives every instance
the same dashboard agent port, so several could not live side by side. Everything listens on
loopback only, and asks for the record's token.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from cluster.machine import LocalRecord, load_record, reap

LOOPBACK = "127.0.0.1"
_LOOK_EVERY_S = 0.2


def main(record_path: Path, parent_pid: int) -> int:
    """Hold the local Ray of `record_path` until it isn't wanted any more."""
    stopping = threading.Event()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    record = load_record(record_path)
    if record is None:  # `tandem down` was faster
        return 1
    node: Any = None
    try:
        node = _start_head(record)
        record = record.model_copy(
            update={
                "address": node.address,
                "dashboard_url": f"http://{node.webui_url}" if record.dashboard else None,
                "holder_pid": os.getpid(),
            }
        )
        record.save()
        while not stopping.wait(_LOOK_EVERY_S):
            orphaned = parent_pid and os.getppid() != parent_pid
            if orphaned or node.dead_processes():
                break
    finally:
        if node is not None:
            node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)
        reap(record.id, spare={os.getpid()})
        record.forget()
    return 0


def _start_head(record: LocalRecord) -> Any:
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    params = RayParams(
        node_ip_address=LOOPBACK,
        temp_dir=record.temp_dir,
        num_cpus=record.num_cpus,
        num_gpus=record.num_gpus,
        # 0 lets the system choose, so that any number of local Rays coexist.
        gcs_server_port=0,
        min_worker_port=0,
        max_worker_port=0,
        dashboard_agent_listen_port=0,
        include_dashboard=record.dashboard,
        dashboard_host=LOOPBACK,
        dashboard_port=0 if record.dashboard else None,
        no_monitor=True,  # the autoscaler's; one machine has nothing to add
    )
    return Node(params, head=True, shutdown_at_exit=False, spawn_reaper=False)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
