"""gRPC beside HTTP's binary tensors: the same service, the same model, the same tensors, the same client.

Requests a second, closed loop, by h2load (which speaks both HTTP/1.1 and HTTP/2), for a row of 64 floats
and for one of 3 x 224 x 224; and what a call of the unmodified `tritonclient` takes, one at a time. h2load
doesn't see a gRPC status, so each run is held against the replicas' own count of good answers.

    python -m tests.bench.grpc_path [--pairs 5] [--seconds 3] [--no-haproxy] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from onnx import TensorProto, helper
from rich.console import Console
from tritonclient.grpc._utils import _get_inference_request as grpc_request
from tritonclient.http._utils import _get_inference_request as http_request

from cluster.signature import Signature, Tensor
from cluster.storage import open_store
from tests.bench.machine import distributions, machine_facts, use_cores
from tests.bench.pairs import PAIRS, Comparison, Report, in_turn
from tests.servables import publish
from tests.serving_process import ServiceProcess, serving

CORES = 2
CONNECTIONS = 32
CALLS = 200
SHAPES = {"row": (1, 64), "image": (1, 3, 224, 224)}
INFER = "/inference.GRPCInferenceService/ModelInfer"
INSTALL = "h2load is needed: apt-get update && apt-get install -y nghttp2-client"
GRACE_S = 30
COUNTED_WITHIN_S = 10
COMPRESSED_FLAG_AND_LENGTH = 5


@dataclass(frozen=True)
class Way:
    """How h2load asks for a model."""

    url: str
    headers: dict[str, str]
    body: Path
    options: tuple[str, ...] = ()


def mean_graph(shape: tuple[int, ...]) -> bytes:
    """The mean of each row: next to no work, whatever its size."""
    nodes = [
        helper.make_node("Flatten", ["x"], ["flat"], axis=1),
        helper.make_node("ReduceMean", ["flat"], ["y"], axes=[1], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape[1:]])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])]
    graph = helper.make_graph(nodes, "mean", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    return bytes(model.SerializeToString())


@contextlib.contextmanager
def service(folder: Path, *options: str) -> Iterator[ServiceProcess]:
    """Both models, a replica each, with gRPC."""
    store = open_store(str(folder / "store"))
    for name, shape in SHAPES.items():
        x = Tensor(name="x", dtype="FP32", shape=(-1, *shape[1:]))
        y = Tensor(name="y", dtype="FP32", shape=(-1,))
        publish(store, name, mean_graph(shape), Signature(task="mean", inputs=(x,), outputs=(y,)))
    models = [{"model": f"{name}@live", "replicas": {"cpus": 0.5}} for name in SHAPES]
    with serving({"store": store.uri, "models": models}, folder, "--grpc-port", "0", *options) as running:
        yield running


def ways(running: ServiceProcess, name: str, folder: Path) -> tuple[Way, Way]:
    """By gRPC and by HTTP, with the bytes that tritonclient would send."""
    x = np.full(SHAPES[name], 0.5, np.float32)
    by_grpc = triton_grpc.InferInput("x", list(x.shape), "FP32")
    by_grpc.set_data_from_numpy(x)
    message = grpc_request(name, [by_grpc], "", "", None, 0, False, False, 0, None, None).SerializeToString()
    framed = folder / f"{name}.grpc"
    framed.write_bytes(bytes(1) + len(message).to_bytes(4) + message)

    by_http = triton_http.InferInput("x", list(x.shape), "FP32").set_data_from_numpy(x, binary_data=True)
    wanted = [triton_http.InferRequestedOutput("y", binary_data=True)]
    body, json_bytes = http_request([by_http], "", wanted, 0, False, False, 0, None, None)
    plain = folder / f"{name}.http"
    plain.write_bytes(body)
    return (
        Way(
            f"http://{running.grpc_url}{INFER}",
            {"content-type": "application/grpc", "te": "trailers"},
            framed,
        ),
        Way(
            f"{running.url}/v2/models/{name}/infer",
            {"inference-header-content-length": str(json_bytes)},
            plain,
            ("--h1",),
        ),
    )


def requests_per_s(way: Way, seconds: int, good: Callable[[], float]) -> float:
    """Good answers a second.

    Raises:
        AssertionError: the replicas answered fewer well than h2load counted.
    """
    before = good()
    headers = [part for name, value in way.headers.items() for part in ("-H", f"{name}: {value}")]
    command = ["h2load", "-t1", f"-c{CONNECTIONS}", "-m1", f"-D{seconds}", "--warm-up-time=1", *way.options]
    done = subprocess.run(
        [*command, "-d", str(way.body), *headers, way.url],
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds + GRACE_S,
    )
    found = re.search(r"requests: (\d+) total.* (\d+) succeeded", done.stdout)
    assert found, done.stdout
    deadline_s = time.monotonic() + COUNTED_WITHIN_S
    while good() - before < int(found[2]):
        assert time.monotonic() < deadline_s, f"{good() - before} good answers of {found[2]}"
        time.sleep(0.2)
    return int(found[2]) / seconds


def good_answers(url: str, model: str) -> float:
    """How many infer requests the model's replicas have answered with 200."""
    labels = (f'model="{model}"', 'route="infer"', 'status="200"')
    lines = httpx.get(f"{url}/metrics", trust_env=False).text.splitlines()
    found = [
        line
        for line in lines
        if line.startswith("tandem_requests_total") and all(label in line for label in labels)
    ]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def milliseconds(module: Any, url: str, name: str, **options: Any) -> float:
    """The median time of a call by a tritonclient, one at a time."""
    x = np.full(SHAPES[name], 0.5, np.float32)
    with contextlib.closing(module.InferenceServerClient(url)) as client:
        asked = module.InferInput("x", list(x.shape), "FP32")
        asked.set_data_from_numpy(x)
        took_s = []
        for _ in range(CALLS):
            began_s = time.perf_counter()
            answer = client.infer(name, [asked])
            took_s.append(time.perf_counter() - began_s)
        np.testing.assert_allclose(answer.as_numpy("y"), [0.5], rtol=1e-5)
    return statistics.median(took_s) * 1000


def measure(folder: Path, pairs: int, seconds: int, options: list[str]) -> list[Comparison]:
    """All figures."""
    found: list[Comparison] = []
    with service(folder, *options) as running:
        for name, shape in SHAPES.items():
            by_grpc, by_http = ways(running, name, folder)

            def good(model: str = name) -> float:
                return good_answers(running.url, model)

            def rate(way: Way, good: Callable[[], float] = good) -> float:
                return requests_per_s(way, seconds, good)

            values = in_turn(lambda w=by_grpc: rate(w), lambda w=by_http: rate(w), pairs)
            figure = f"{name} {list(shape)}: requests/s, {CONNECTIONS} connections"
            found.append(Comparison(figure, "gRPC", "HTTP, binary tensors", tuple(values)))
            times = in_turn(
                lambda n=name: milliseconds(triton_grpc, str(running.grpc_url), n),
                lambda n=name: milliseconds(triton_http, urlsplit(running.url).netloc, n),
                pairs,
            )
            figure = f"{name}: ms a call, tritonclient, one at a time (median of {CALLS})"
            found.append(Comparison(figure, "gRPC", "HTTP, binary tensors", tuple(times)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--seconds", type=int, default=3)
    parser.add_argument("--no-haproxy", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if shutil.which("h2load") is None:
        raise SystemExit(INSTALL)
    use_cores(CORES)
    options = ["--no-haproxy"] if asked.no_haproxy else []
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as folder:
        comparisons = measure(Path(folder), asked.pairs, asked.seconds, options)
    versions = {"client": distributions("tritonclient", "grpcio", "protobuf", "aiohttp")}
    report = Report("gRPC and HTTP", machine_facts(), versions, comparisons)
    report.notes.append("client, ingress, gateway and replicas share the cores")
    report.show(Console(width=180))
    if asked.out:
        report.write(asked.out)


if __name__ == "__main__":
    main()
