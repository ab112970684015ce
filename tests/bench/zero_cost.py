"""The zero-cost model: an MLP 64-128-10 whose work is too small to matter, so the servers are compared.

One graph, one row and its right answer, from a fixed seed; every server is given the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

FEATURES = 64
HIDDEN = 128
CLASSES = 10


@dataclass(frozen=True)
class ZeroCost:
    """The model as bytes of an ONNX file, a row for it, and what it gives."""

    graph: bytes
    """Input `features` float32 [-1, 64], output `scores` float32 [-1, 10]."""
    row_F: list[float]
    scores_K: list[float]

    def right(self, scores: list[float]) -> bool:
        """Whether a server's answer is the model's."""
        return len(scores) == CLASSES and bool(np.allclose(scores, self.scores_K, rtol=1e-4, atol=1e-5))


def zero_cost() -> ZeroCost:
    """The model, the same on every call."""
    rng = np.random.Generator(np.random.PCG64(64_128_10))
    weights: dict[str, NDArray[np.float32]] = {
        "w1": _normal(rng, 1 / 8, FEATURES, HIDDEN),
        "b1": _normal(rng, 1, HIDDEN),
        "w2": _normal(rng, 1 / 11, HIDDEN, CLASSES),
        "b2": _normal(rng, 1, CLASSES),
    }
    # Few digits, as in a client's JSON: the length of the body is part of what is measured.
    row_F = np.round(_normal(rng, 1, FEATURES), 4)
    hidden_H = np.maximum(row_F @ weights["w1"] + weights["b1"], 0)
    scores_K = hidden_H @ weights["w2"] + weights["b2"]
    # Through str, so that the numbers stay as short as they were rounded.
    return ZeroCost(_graph(weights), [float(str(x)) for x in row_F], [float(x) for x in scores_K])


def _graph(weights: dict[str, NDArray[np.float32]]) -> bytes:
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["features", "w1", "b1"], ["sum"]),
            helper.make_node("Relu", ["sum"], ["hidden"]),
            helper.make_node("Gemm", ["hidden", "w2", "b2"], ["scores"]),
        ],
        "mlp",
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _normal(rng: np.random.Generator, scale: float, *shape: int) -> NDArray[np.float32]:
    return np.asarray(scale * rng.standard_normal(shape), np.float32)
