"""A replica's process without Ray around it, and one that uses torch instead: for `tests.bench.replicas`.

Loads, answers once, prints what the load took, and waits to be killed. Imports nothing at its top that the
process it stands for wouldn't.

    python -m tests.bench.replica_process replica STORE CACHE WIDTH | torch WEIGHTS WIDTH | bare
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

MODEL = "wide"


async def be_replica(store: str, folder: str, width: int) -> float:
    """Load as a replica does, and answer once; gives the seconds of the load."""
    import numpy as np

    from cluster.names import ModelRef
    from cluster.registry import Registry
    from cluster.storage import open_store
    from serving import app  # noqa: F401 - what Serve imports to start a replica
    from serving.metrics import ReplicaMetrics
    from serving.protocol.requests import InferRequest
    from serving.replica import Replica
    from serving.runtimes.node_cache import NodeCache
    from serving.service import ServedModel

    Path(folder).mkdir(parents=True, exist_ok=True)
    opened = open_store(store)
    served = ServedModel(model=f"{MODEL}@live")
    replica = Replica(served, opened, ReplicaMetrics(MODEL), NodeCache(Path(folder), 10 * 2**30))
    version = Registry(opened).resolve(ModelRef(MODEL, "live"))
    began_s = time.monotonic()
    loaded = await asyncio.to_thread(replica.load, version)
    load_s = time.monotonic() - began_s
    replica.start(loaded)
    request = InferRequest(inputs={"x": np.zeros((1, width), np.float32)}, rows=1)
    with replica.lease() as leased:
        await replica.infer(leased, request, time.monotonic() + 30)
    return load_s


def be_torch(weights: str, width: int) -> float:
    """The same layers in torch."""
    from ray import serve  # noqa: F401 - what Serve imports to start a replica

    began_s = time.monotonic()
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    layers: list[Any] = []
    for square in load_file(weights).values():
        linear = torch.nn.Linear(width, width, bias=False)
        linear.weight = torch.nn.Parameter(square)
        layers += [linear, torch.nn.ReLU()]
    with torch.inference_mode():
        torch.nn.Sequential(*layers)(torch.zeros(1, width))
    return time.monotonic() - began_s


def main(kind: str, *arguments: str) -> None:
    """Be that process."""
    if kind == "replica":
        load_s = asyncio.run(be_replica(arguments[0], arguments[1], int(arguments[2])))
    elif kind == "torch":
        load_s = be_torch(arguments[0], int(arguments[1]))
    else:
        from ray import serve  # noqa: F401

        load_s = 0.0
    sys.stdout.write(json.dumps({"load_s": load_s}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()  # until it is killed
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
