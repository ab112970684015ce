"""Tandem's own server with the zero-cost model: a store in a folder, and `tandem serve` on it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from cluster.signature import Signature, Tensor
from cluster.storage import open_store
from tests.bench.peers import Route
from tests.bench.zero_cost import CLASSES, FEATURES
from tests.servables import publish

MODEL = "zero-cost"
SIGNATURE = Signature(
    task="zero-cost",
    inputs=(Tensor(name="features", dtype="FP32", shape=(-1, FEATURES)),),
    outputs=(Tensor(name="scores", dtype="FP32", shape=(-1, CLASSES)),),
)

INFER = Route(
    f"/v2/models/{MODEL}/infer",
    body=lambda row: {
        "inputs": [{"name": "features", "datatype": "FP32", "shape": [1, FEATURES], "data": row}]
    },
    scores=lambda answer: answer["outputs"][0]["data"],
)
PREDICT = Route(
    f"/v1/models/{MODEL}:predict",
    body=lambda row: {"instances": [row]},
    scores=lambda answer: answer["predictions"][0]["scores"],
)


def write_store(folder: Path, graph: bytes) -> None:
    """A store below `folder` in which the graph is `zero-cost@live`."""
    publish(open_store(str(folder)), MODEL, graph, SIGNATURE)


def command(store: Path, port: int, model: str = MODEL) -> list[str]:
    """What a user would type."""
    tandem = Path(sys.executable).with_name("tandem")
    return [str(tandem), "serve", f"{model}@live", "--store", str(store), "--port", str(port), "--json"]


def variables(state: Path) -> dict[str, str]:
    """The environment variables of the command; what it starts is recorded below `state`."""
    return {**os.environ, "TANDEM_STATE_DIR": str(state)}
