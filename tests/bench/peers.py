"""The servers compared with: how each is installed, started, asked and understood.

Each runs the same ONNX graph in ONNX Runtime with one thread (`servers/mlp.py`), takes 64 numbers
as JSON, gives 10 as JSON, and is set up as its own documentation advises for throughput. The one
exception says so in its name: Ray Serve with every setting at its default.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.environments import environment

SERVERS = Path(__file__).with_name("servers")
ONNXRUNTIME = "onnxruntime==1.32.0"


@dataclass(frozen=True)
class Route:
    """How a server is asked."""

    path: str
    body: Callable[[list[float]], Any]
    """From a row to the JSON document posted."""
    scores: Callable[[Any], Any]
    """From the JSON document answered to the row's 10 numbers."""


@dataclass(frozen=True)
class Peer:
    """A server to compare with."""

    name: str
    set_up: str
    """How it is configured, for the notes."""
    requirements: tuple[str, ...]
    """Of its own virtual environment; empty where the project's is used."""
    command: Callable[[Path, int], list[str]]
    """From the environment's `bin` and a port to the command line."""
    route: Route
    aim: float | None = None
    """The ratio of requests a second that Tandem aims at."""

    def bin(self) -> Path:
        """The environment's `bin`, installed if need be.

        Raises:
            NotInstalled: it can't be.
        """
        if not self.requirements:
            return Path(sys.executable).parent
        return environment(self.requirements[0].partition("=")[0], self.requirements)


def peer_variables(model: Path) -> dict[str, str]:
    """The environment variables that every peer is started with."""
    return {
        **os.environ,
        "BENCH_MODEL": str(model),
        "PYTHONPATH": str(SERVERS),
        "BENTOML_DO_NOT_TRACK": "True",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _script(name: str, *arguments: str) -> Callable[[Path, int], list[str]]:
    """The environment's Python on one of the servers, with the port after `arguments`."""
    return lambda bin, port: [str(bin / "python"), str(SERVERS / name), *arguments, str(port)]


def _one_row(path: str) -> Route:
    return Route(path, body=lambda row: {"features": row}, scores=lambda answer: answer["scores"])


PEERS = {
    "serve": Peer(
        name="Ray Serve, all defaults",
        set_up="@serve.batch and @serve.deployment without arguments. It is quickest at 5 connections, its"
        " max_ongoing_requests; beyond, requests wait for the router to try again",
        requirements=(),
        command=_script("serve_batch.py"),
        route=_one_row("/"),
        aim=20,
    ),
    "serve-tuned": Peer(
        name="Ray Serve, tuned batch",
        set_up="max_ongoing_requests=1000, @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.005)",
        requirements=(),
        command=_script("serve_batch.py", "--tuned"),
        route=_one_row("/"),
        aim=20,
    ),
    "litserve": Peer(
        name="LitServe",
        set_up="fast_queue, max_batch_size=64, batch_timeout=5 ms, 2 workers, 2 API servers",
        requirements=("litserve==0.2.19", ONNXRUNTIME),
        command=_script("lit_mlp.py"),
        route=_one_row("/predict"),
        aim=5,
    ),
    "bentoml": Peer(
        name="BentoML",
        set_up="batchable, max_batch_size=64, 2 workers, access log off",
        requirements=("bentoml==1.4.39", ONNXRUNTIME),
        command=lambda bin, port: [
            *(str(bin / "bentoml"), "serve", "bento_mlp:Model", "--working-dir", str(SERVERS)),
            *("--host", "127.0.0.1", "--port", str(port)),
        ],
        # BentoML's batchable APIs take and give batches: the row is a batch of one.
        route=Route("/predict", body=lambda row: {"features": [row]}, scores=lambda answer: answer[0]),
        aim=5,
    ),
    "mosec": Peer(
        name="Mosec",
        set_up="Rust front, max_batch_size=64, max_wait_time=1 ms, 1 worker",
        requirements=("mosec==0.9.8", ONNXRUNTIME),
        command=_script("mosec_mlp.py", "--address", "127.0.0.1", "--log-level", "warning", "--port"),
        route=_one_row("/inference"),
    ),
}
