"""The benchmark's sleeping device as one of Tandem's runtimes, brought by a package as users' own are.

Everything else of what is measured is the product: `tandem serve` with HAProxy, its protocol, door, planner.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cluster.manifest import Manifest
from cluster.signature import Signature, Tensor
from cluster.storage import Store, open_store
from serving.runtimes.base import Arrays
from tests.bench.open_loop import Planned, http_post
from tests.bench.peers import SERVERS
from tests.servables import publish

MODEL = "device"
RUNTIME = "bench-device"
DUE = Tensor(name="due", dtype="FP64", shape=(-1, 1))
TOKENS = Tensor(name="tokens", dtype="UINT8", shape=(-1, -1), padding=0)
FIXED = Signature(task="sleep", inputs=(DUE,), outputs=(DUE,))
VARYING = Signature(task="sleep", inputs=(DUE, TOKENS), outputs=(DUE,))
_PATH = f"/v2/models/{MODEL}/infer"


class DeviceRuntime:
    """Sleeps as the device does. A token is 1, what is padded 0."""

    platform = "bench"

    def __init__(self) -> None:
        sys.path.append(str(SERVERS))  # where it stands for the other servers, too
        import device

        self._device = device

    def run(self, inputs: Arrays) -> Arrays:
        tokens = inputs.get("tokens", np.zeros((len(inputs["due"]), 0), np.uint8))
        lengths = tokens.sum(axis=1, dtype=np.int64).tolist()
        self._device.run(inputs["due"][:, 0].tolist(), lengths, tokens.shape[1])
        return {"due": inputs["due"]}

    def close(self) -> None:
        pass


def load(store: Store, manifest: Manifest, signature: Signature, *, threads: int) -> DeviceRuntime:
    """The entry point."""
    return DeviceRuntime()


def command(folder: Path, port: int, signature: Signature, slo_ms: float, max_rows: int) -> list[str]:
    """A store below `folder` with the device as a model, and how it is served."""
    store = str(folder / "store")
    publish(open_store(store), MODEL, b"", signature, runtime=RUNTIME)
    model: dict[str, Any] = {"model": f"{MODEL}@live", "slo_ms": slo_ms, "max_batch_size": max_rows}
    service = folder / "service.yaml"
    service.write_text(json.dumps({"store": store, "models": [{**model, "max_queue_rows": 4096}]}))
    return [
        str(Path(sys.executable).with_name("tandem")),
        "serve",
        str(service),
        "--port",
        str(port),
        "--json",
    ]


def variables(folder: Path, log: Path) -> dict[str, str]:
    """The environment of the command, with the runtime as an installed package."""
    package = folder / "packages" / "tandem_bench_device-0.dist-info"
    package.mkdir(parents=True, exist_ok=True)
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: tandem-bench-device\nVersion: 0\n")
    (package / "entry_points.txt").write_text(f"[tandem.runtimes]\n{RUNTIME} = {__name__}:load\n")
    repository = Path(__file__).parents[2]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(package.parent), str(repository)]),
        "TANDEM_STATE_DIR": str(folder / "state"),
        "BENCH_DEVICE_LOG": str(log),
    }


def by_service(planned: Planned, due_s: float) -> bytes:
    """A request that has the service's own time."""
    return http_post(_PATH, _body(due_s), "content-type: application/json")


def by_header(planned: Planned, due_s: float) -> bytes:
    """A request that says how much time it has."""
    wanted = f"x-request-timeout-seconds: {planned.within_s}"
    return http_post(_PATH, _body(due_s), "content-type: application/json", wanted)


def with_tokens(planned: Planned, due_s: float) -> bytes:
    """A request of `length` tokens, as binary tensors."""
    inputs = [
        {"name": "due", "datatype": "FP64", "shape": [1, 1], "parameters": {"binary_data_size": 8}},
        {
            "name": "tokens",
            "datatype": "UINT8",
            "shape": [1, planned.length],
            "parameters": {"binary_data_size": planned.length},
        },
    ]
    text = json.dumps({"inputs": inputs}).encode()
    body = text + np.float64(due_s).tobytes() + b"\x01" * planned.length
    header = f"inference-header-content-length: {len(text)}"
    return http_post(_PATH, body, "content-type: application/octet-stream", header)


def _body(due_s: float) -> bytes:
    inputs = [{"name": "due", "datatype": "FP64", "shape": [1, 1], "data": [due_s]}]
    return json.dumps({"inputs": inputs}).encode()
