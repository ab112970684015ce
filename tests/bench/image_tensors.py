"""One image, 3x224x224 FP32, by the Open Inference Protocol: as JSON, and by its binary extension.

The model averages each channel, so that the way there is measured and not the model. Both bodies hold the
same numbers, written with few digits, and both are asked of one and the same server through its ingress.
"""

from __future__ import annotations

import json
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from cluster.signature import Signature, Tensor
from cluster.storage import open_store
from tests.bench import tandem_server
from tests.bench.load import drive
from tests.bench.pairs import Comparison, in_turn
from tests.bench.processes import free_port, running
from tests.servables import publish

MODEL = "image-mean"
SHAPE = (3, 224, 224)
CONNECTIONS = 8
AIM = 5
READY_WITHIN_S = 120
ANSWER_WITHIN_S = 10
PATH = f"/v2/models/{MODEL}/infer"
SIGNATURE = Signature(
    task="image-mean",
    inputs=(Tensor(name="image", dtype="FP32", shape=(-1, *SHAPE)),),
    outputs=(Tensor(name="means", dtype="FP32", shape=(-1, SHAPE[0])),),
)


@dataclass(frozen=True)
class Body:
    """A request in one of the two forms."""

    file: Path
    headers: dict[str, str]


def bodies(folder: Path) -> tuple[Body, Body, list[float]]:
    """The request as JSON, in binary, and the right answer."""
    rng = np.random.Generator(np.random.PCG64(3_224_224))
    image = np.round(rng.standard_normal(SHAPE), 4).astype(np.float32)
    entry = {"name": "image", "datatype": "FP32", "shape": [1, *SHAPE]}
    numbers = [float(str(value)) for value in image.ravel()]
    text = Body(folder / "image.json", {"Content-Type": "application/json"})
    text.file.write_text(json.dumps({"inputs": [{**entry, "data": numbers}]}, separators=(",", ":")))
    head = json.dumps({"inputs": [{**entry, "parameters": {"binary_data_size": image.nbytes}}]}).encode()
    binary = Body(
        folder / "image.bin",
        {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))},
    )
    binary.file.write_bytes(head + image.tobytes())
    return text, binary, image.mean(axis=(1, 2)).tolist()


def compare(pairs: int, seconds: int) -> Comparison:
    """Requests a second in binary beside those as JSON.

    Raises:
        NotStarted: Tandem doesn't start.
    """
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        folder = Path(name)
        text, binary, means = bodies(folder)
        with _server(folder, (text, binary), means) as url:

            def rate(body: Body) -> float:
                load = drive(url, body.file, connections=CONNECTIONS, seconds=seconds, headers=body.headers)
                return load.requests_per_s

            for body in (text, binary):
                rate(body)  # uncounted
            found = in_turn(lambda: rate(binary), lambda: rate(text), pairs)
    return Comparison(
        figure=f"requests/s, an image of 3x224x224 FP32, {CONNECTIONS} connections",
        ours="infer, binary",
        peer="infer, JSON",
        values=tuple(found),
        aim=AIM,
    )


@contextmanager
def _server(folder: Path, forms: tuple[Body, ...], means: list[float]) -> Iterator[str]:
    """The URL of a server that answers right in both forms."""
    publish(open_store(str(folder / "store")), MODEL, _graph(), SIGNATURE)
    port = free_port()
    url = f"http://127.0.0.1:{port}{PATH}"
    command = tandem_server.command(folder / "store", port, MODEL)

    def ready() -> bool:
        try:
            answers = [_post(url, body) for body in forms]
        except OSError:
            return False
        for answer in answers:
            assert np.allclose(answer["outputs"][0]["data"], means, atol=1e-4), answer
        return True

    with running(
        command, env=tandem_server.variables(folder / "state"), ready=ready, within_s=READY_WITHIN_S
    ):
        yield url


def _post(url: str, body: Body) -> dict[str, list[dict[str, list[float]]]]:
    request = urllib.request.Request(url, body.file.read_bytes(), body.headers)
    with urllib.request.urlopen(request, timeout=ANSWER_WITHIN_S) as response:
        answer: dict[str, list[dict[str, list[float]]]] = json.loads(response.read())
        return answer


def _graph() -> bytes:
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["image"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["means"]),
        ],
        "image-mean",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", *SHAPE])],
        [helper.make_tensor_value_info("means", TensorProto.FLOAT, ["batch", SHAPE[0]])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())
