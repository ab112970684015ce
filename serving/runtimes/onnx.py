"""Runs ONNX graphs in ONNX Runtime.

The graph comes as bytes that were verified against their manifest; graphs that point at other files
(external data) are refused by that, since there are no such files. Custom operator libraries are never
loaded.
"""

from __future__ import annotations

from typing import Any

from cluster.errors import Damaged, shown
from cluster.inference import onnxruntime
from cluster.signature import DataType, Signature, Tensor
from serving.runtimes.base import Arrays
from serving.runtimes.node_cache import Held
from serving.runtimes.prepare import MODEL

_ONNX_TYPES: dict[str, DataType] = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}


class OnnxRuntime:
    """One session. ONNX Runtime's sessions are safe to run from several threads.

    Args:
        graph: a serialised ONNX model, or a prepared one on this node, which stays until `close`.
        signature: what it is said to take and give.
        threads: threads of one batch (intra-op); 0 lets ONNX Runtime choose.

    Raises:
        Damaged: the graph can't be loaded, or isn't what the signature says.
    """

    platform = "onnx"

    def __init__(self, graph: bytes | Held, signature: Signature, *, threads: int) -> None:
        module = onnxruntime()
        options = module.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Between batches, spinning threads would take the cores that parse requests.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3  # errors; they arrive as exceptions too
        self._held = graph if isinstance(graph, Held) else None
        source = str(graph.folder / MODEL) if isinstance(graph, Held) else graph
        try:
            self._session = module.InferenceSession(source, options, providers=_providers())
        except Exception as error:  # noqa: BLE001 - ONNX Runtime has no root for its exceptions
            raise Damaged(
                "the servable's graph can't be loaded",
                got=shown(str(error).strip().split("\n", 1)[0]),
                allowed=f"an ONNX model that ONNX Runtime {module.__version__} loads",
                fix="export the model again",
            ) from None
        self._signature = signature
        self._output_names = [tensor.name for tensor in signature.outputs]
        _check("input", signature.inputs, self._session.get_inputs())
        _check("output", signature.outputs, self._session.get_outputs())

    def run(self, inputs: Arrays) -> Arrays:
        values = self._session.run(self._output_names, inputs)
        return dict(zip(self._output_names, values, strict=True))

    def close(self) -> None:
        del self._session
        if self._held is not None:
            self._held.release()


def runs_on_cpu() -> bool:
    """Whether sessions here run on the processor, not on a GPU."""
    return _providers() == ["CPUExecutionProvider"]


def _providers() -> list[str]:
    available = onnxruntime().get_available_providers()
    return [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in available]


def _check(side: str, said: tuple[Tensor, ...], found: list[Any]) -> None:
    """Every tensor said is there, with that type and a shape that fits; inputs: no others."""
    by_name = {node.name: node for node in found}
    for tensor in said:
        node = by_name.pop(tensor.name, None)
        if node is None:
            raise _mismatch(f"has no {side} '{tensor.name}'", ", ".join(n.name for n in found), "")
        if _ONNX_TYPES.get(node.type) != tensor.dtype:
            raise _mismatch(f"has another type for {side} '{tensor.name}'", node.type, tensor.dtype)
        if not _fits(list(node.shape), tensor.shape):
            got, allowed = str(list(node.shape)), str(list(tensor.shape))
            raise _mismatch(f"has another shape for {side} '{tensor.name}'", got, allowed)
    if side == "input" and by_name:
        raise _mismatch("takes inputs that the signature doesn't name", ", ".join(by_name), "")


def _fits(found: list[int | str | None], said: tuple[int, ...]) -> bool:
    # Exporters leave out the shapes of some outputs: an empty list says nothing.
    if not found:
        return True
    if len(found) != len(said) or isinstance(found[0], int):
        return False  # axis 0 must be free: it is the batch
    return all(
        not isinstance(got, int) or wanted in (got, -1) for got, wanted in zip(found, said, strict=True)
    )


def _mismatch(what: str, got: str, allowed: str) -> Damaged:
    return Damaged(
        f"the servable's graph {what}",
        got=got,
        allowed=allowed or "the tensors of its signature",
        fix="export the model again",
    )
