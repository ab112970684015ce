"""Small servables made without torch, for tests of serving: an MLP with labels, and a table.

`publish_mlp(store, "digits")` commits a graph, registers it and promotes it; each version's bias tells
it apart from the others in its answers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cluster.artifacts import Artifacts
from cluster.registry import Registry, Version
from cluster.signature import ImageEncoding, Signature, Tensor
from cluster.storage import Store

LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

MLP = Signature(
    task="vector-classification",
    inputs=(Tensor(name="x", dtype="FP32", shape=(-1, 64)),),
    outputs=(
        Tensor(name="label", dtype="BYTES", shape=(-1,)),
        Tensor(name="probabilities", dtype="FP32", shape=(-1, 10)),
    ),
    labels=LABELS,
)

TABLE = Signature(
    task="tabular-regression",
    inputs=(
        Tensor(name="age", dtype="FP32", shape=(-1,), nullable=True),
        Tensor(name="city", dtype="BYTES", shape=(-1,), nullable=True),
    ),
    outputs=(Tensor(name="value", dtype="FP32", shape=(-1,)),),
)

GATHER = Signature(
    task="look-up",
    inputs=(Tensor(name="index", dtype="INT64", shape=(-1,)),),
    outputs=(Tensor(name="value", dtype="FP32", shape=(-1,)),),
)

PICTURE = Signature(
    task="image-regression",
    inputs=(
        Tensor(
            name="image",
            dtype="UINT8",
            shape=(-1, 8, 8, 1),
            encoding=ImageEncoding(height=8, width=8, channels=1),
        ),
    ),
    outputs=(Tensor(name="value", dtype="FP32", shape=(-1,)),),
)


def mlp_graph(favourite: int, seed: int = 0) -> bytes:
    """64 floats to a label and 10 probabilities; with all-zero input the label is `LABELS[favourite]`."""
    rng = np.random.default_rng(seed)
    bias = np.zeros(10, np.float32)
    bias[favourite] = 5
    nodes = [
        helper.make_node("Gemm", ["x", "w1", "b1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "w2", "b2"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0),
        helper.make_node("Gather", ["labels", "best"], ["label"]),
    ]
    weights = {
        "w1": rng.normal(0, 0.1, (64, 128)).astype(np.float32),
        "b1": np.zeros(128, np.float32),
        "w2": rng.normal(0, 0.1, (128, 10)).astype(np.float32),
        "b2": bias,
        "labels": np.array(LABELS, dtype=object),
    }
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])]
    outputs = [
        helper.make_tensor_value_info("label", TensorProto.STRING, ["n"]),
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 10]),
    ]
    return _model(nodes, inputs, outputs, weights)


def table_graph() -> bytes:
    """`value` is the age (0 where it is missing), plus 100 in Paris."""
    nodes = [
        helper.make_node("IsNaN", ["age"], ["missing"]),
        helper.make_node("Where", ["missing", "nought", "age"], ["known"]),
        helper.make_node(
            "LabelEncoder",
            ["city"],
            ["bonus"],
            domain="ai.onnx.ml",
            keys_strings=["Paris"],
            values_floats=[100.0],
            default_float=0.0,
        ),
        helper.make_node("Add", ["known", "bonus"], ["value"]),
    ]
    inputs = [
        helper.make_tensor_value_info("age", TensorProto.FLOAT, ["n"]),
        helper.make_tensor_value_info("city", TensorProto.STRING, ["n"]),
    ]
    outputs = [helper.make_tensor_value_info("value", TensorProto.FLOAT, ["n"])]
    return _model(nodes, inputs, outputs, {"nought": np.zeros(1, np.float32)})


def gather_graph(values: int = 8) -> bytes:
    """`value[i] = 10 * index[i]` below `values`; any other index makes the whole batch raise: a poison."""
    nodes = [helper.make_node("Gather", ["values", "index"], ["value"])]
    inputs = [helper.make_tensor_value_info("index", TensorProto.INT64, ["n"])]
    outputs = [helper.make_tensor_value_info("value", TensorProto.FLOAT, ["n"])]
    return _model(nodes, inputs, outputs, {"values": np.arange(values, dtype=np.float32) * 10})


def picture_graph() -> bytes:
    """`value` is the mean of a picture's pixels, 0 to 255."""
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["value"], keepdims=0),
    ]
    inputs = [helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 8, 8, 1])]
    outputs = [helper.make_tensor_value_info("value", TensorProto.FLOAT, ["n"])]
    return _model(nodes, inputs, outputs, {"axes": np.array([1, 2, 3], np.int64)})


def slow_graph(size: int = 1024, layers: int = 80) -> bytes:
    """The MLP's signature, but a batch takes some 100 ms: for overload, deadlines and drains."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("MatMul", ["x", "wide"], ["h0"])]
    for layer in range(layers):
        nodes.append(helper.make_node("MatMul", [f"h{layer}", "square"], [f"m{layer}"]))
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [f"h{layer + 1}"]))
    nodes += [
        helper.make_node("MatMul", [f"h{layers}", "narrow"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
        helper.make_node("ArgMax", ["logits"], ["best"], axis=1, keepdims=0),
        helper.make_node("Gather", ["labels", "best"], ["label"]),
    ]
    weights = {
        "wide": rng.normal(0, 0.1, (64, size)).astype(np.float32),
        "square": rng.normal(0, 0.02, (size, size)).astype(np.float32),
        "narrow": rng.normal(0, 0.1, (size, 10)).astype(np.float32),
        "labels": np.array(LABELS, dtype=object),
    }
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])]
    outputs = [
        helper.make_tensor_value_info("label", TensorProto.STRING, ["n"]),
        helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["n", 10]),
    ]
    return _model(nodes, inputs, outputs, weights)


def publish(
    store: Store,
    model: str,
    graph: bytes,
    signature: Signature,
    *,
    alias: str | None = "live",
    runtime: str = "onnx",
) -> Version:
    """Commit a servable, register it as the model's next version and, with an alias, promote it."""
    artifacts = Artifacts(store, f"runs/test-{model}/servables", "servable")
    number = artifacts.head() + 1
    files: dict[str, Any] = {
        "graph.onnx": graph,
        "signature.json": signature.model_dump_json(indent=1).encode(),
    }
    artifacts.commit(number, files, {"runtime": runtime})
    key = f"runs/test-{model}/servables/{number:08d}/manifest.json"
    registry = Registry(store)
    version = registry.register(
        model, manifest_key=key, manifest=store.get(key), run=f"test-{model}", metrics={}, why="test"
    )
    if alias:
        registry.promote(model, alias, version.version, why="test")
    return version


def publish_mlp(
    store: Store, model: str = "digits", favourite: int = 0, *, alias: str | None = "live"
) -> Version:
    """Publish an MLP whose answer to zeros is `LABELS[favourite]`."""
    return publish(store, model, mlp_graph(favourite), MLP, alias=alias)


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, Any]) -> bytes:
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "test", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())
