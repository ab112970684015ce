"""From a trained model to a servable: `graph.onnx` and `signature.json`.

The graph takes what a client has (pixels, numbers, words) and gives what a client wants (labels,
probabilities, values). torch knows no strings, so two things are added to what it exports: a look-up
of words for each BYTES input, and for a classifier's `label` the name of the likeliest class.

The same weights give the same bytes, and nothing of the machine is in them: no paths, no stack
traces, no names of modules. Before the files are handed out they are run beside the torch model.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import InlinePass

from cluster.errors import BadInput, TandemError, shown
from cluster.signature import Signature, Tensor
from training.data.words import encode_words
from training.parity import check_parity, check_type
from training.servable import GRAPH_FILE, SIGNATURE_FILE, Servable
from training.task import Arrays, Task

OPSET = 20
ML_OPSET = 3
MAX_GRAPH_BYTES = 1_500_000_000
"""A file of protocol buffers can't exceed 2 GiB; Tandem keeps away from that edge."""

_TRACED_ROWS = 3
_CHECKED_ROWS = (1, 2, 5)


def export(task: Task, model: torch.nn.Module) -> dict[str, bytes]:
    """A model's servable, checked against the model itself. The model is left as it is.

    Args:
        task: names the inputs and outputs and gives the module to export.
        model: what `task.build_model` gave, trained; on any device, in any mode.

    Returns:
        The servable's files by name.

    Raises:
        BadInput: the signature can't be put into a graph (`Task.check`), the module gives something
            else than it announces, or the graph would be over 1.5 GB.
        TandemError: torch can't export the model, or the graph gives other values than the model.
    """
    task.check()
    signature = task.signature()
    vocabularies = task.vocabularies()
    module = _Positional(task.graph(copy.deepcopy(model))).cpu().float().eval()
    _check_size(module)
    rng = np.random.default_rng(0)

    def module_inputs(arrays: Arrays) -> tuple[torch.Tensor, ...]:
        indices = {name: encode_words(arrays[name], words) for name, words in vocabularies.items()}
        return tuple(torch.from_numpy({**arrays, **indices}[name]) for name in task.input_names)

    with torch.no_grad(), torch.autocast("cpu", enabled=False), _quiet():
        example = module_inputs(task.example_inputs(_TRACED_ROWS, rng))
        _check_outputs(module(*example), signature)
        traced = _trace(module, example, signature)
        graph = _finished(traced, signature, vocabularies)
        files = {
            GRAPH_FILE: graph,
            SIGNATURE_FILE: signature.model_dump_json(indent=1, exclude_none=True).encode(),
        }
        servable = Servable(files)
        for rows in _CHECKED_ROWS:
            arrays = task.example_inputs(rows, rng)
            expected = [tensor.numpy() for tensor in module(*module_inputs(arrays))]
            check_parity(signature, expected, servable.run(arrays), rows)
    return files


class _Positional(torch.nn.Module):
    """Whatever a task's graph takes and gives, as positional tensors and a tuple of tensors."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner  # torch's tracer has a `graph` of its own

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.inner(*inputs)
        return (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)


def _check_outputs(outputs: tuple[torch.Tensor, ...], signature: Signature) -> None:
    """Are these, of `_TRACED_ROWS` rows, what the signature announces?"""
    given = _given(signature)
    if len(outputs) != len(given):
        raise BadInput(
            "the graph's outputs are not those of the signature",
            got=f"{len(outputs)} tensors",
            allowed=f"{len(given)}: {', '.join(given)}",
            fix="correct the task's graph() or signature()",
        )
    for tensor, values in zip(given.values(), outputs, strict=True):
        check_type(tensor, values.numpy(), _TRACED_ROWS)


def _given(signature: Signature) -> dict[str, Tensor]:
    """The outputs that the module itself gives."""
    return {tensor.name: tensor for tensor in signature.outputs if tensor.dtype != "BYTES"}


def _check_size(module: torch.nn.Module) -> None:
    tensors = [*module.parameters(), *module.buffers()]
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size_bytes > MAX_GRAPH_BYTES:
        raise BadInput(
            "the model is too large for one ONNX file",
            got=f"{size_bytes:,} bytes of weights",
            allowed=f"at most {MAX_GRAPH_BYTES:,} bytes",
            fix="choose a smaller width or depth",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps back what torch's exporter says of itself and nobody can act on."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # "torchvision is not installed"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)`", FutureWarning)
            yield
    finally:
        registration.setLevel(level)


def _trace(module: _Positional, inputs: tuple[torch.Tensor, ...], signature: Signature) -> ir.Model:
    """What torch itself exports: every axis that the signature calls -1 may vary."""
    batch = torch.export.Dim("batch")
    axes = tuple(
        {axis: batch if axis == 0 else torch.export.Dim.DYNAMIC for axis, n in enumerate(t.shape) if n == -1}
        for t in signature.inputs
    )
    try:
        exported = torch.export.export(module, inputs, dynamic_shapes=(axes,))
        program = torch.onnx.export(exported, opset_version=OPSET, external_data=False, verbose=False)
    except Exception as error:
        raise TandemError(
            "the model can't be exported as an ONNX graph",
            got=shown(_first_cause(error)),
            allowed="tensor operations that ONNX has, for any number of rows",
            fix="see the cause above; data-dependent branches and fixed batch sizes are the usual ones",
        ) from error
    assert program is not None, "only the deprecated exporter gives none"
    return program.model


def _first_cause(error: BaseException) -> str:
    """What went wrong first: torch wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _finished(model: ir.Model, signature: Signature, vocabularies: dict[str, tuple[str, ...]]) -> bytes:
    """The graph with the signature's own names, strings in and out, and nothing of the machine."""
    if model.functions:
        InlinePass()(model)
    _anonymise(model, {tensor.name for tensor in (*signature.inputs, *signature.outputs)})
    for place, tensor in enumerate(signature.inputs):
        _set_input(model.graph, place, tensor, vocabularies.get(tensor.name))
    _set_outputs(model.graph, signature)
    model.graph.sort()
    model.opset_imports["ai.onnx.ml"] = ML_OPSET
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString(deterministic=True))


def _anonymise(model: ir.Model, taken: set[str]) -> None:
    """Numbered names for all values and nodes, none of them `taken`; no notes, no intermediate shapes."""
    model.producer_name, model.producer_version = "tandem", None
    model.doc_string = None
    model.metadata_props.clear()
    count = 0
    for graph in model.graphs():
        graph.doc_string = None
        graph.metadata_props.clear()
        made = [value for node in graph for value in node.outputs]
        for value in (*graph.inputs, *graph.initializers.values(), *made):
            while f"v{count}" in taken:
                count += 1
            value.name = f"v{count}"
            count += 1
            value.doc_string = None
            value.metadata_props.clear()
        for place, node in enumerate(graph):
            node.name = f"n{place}"
            node.doc_string = None
            node.metadata_props.clear()
        for value in made:
            value.shape = None


def _set_input(graph: ir.Graph, place: int, tensor: Tensor, words: Sequence[str] | None) -> None:
    """Give the input the signature's name and shape; a BYTES input goes through a look-up first."""
    inner = graph.inputs[place]
    if words is None:
        inner.name = tensor.name
        inner.shape = _shape(tensor)
        return
    outer = ir.Value(name=tensor.name, shape=_shape(tensor), type=ir.TensorType(ir.DataType.STRING))
    # "" stands for missing, and keeps the list from being empty, which the operator doesn't allow.
    look_up = ir.node(
        "LabelEncoder",
        [outer],
        {"keys_strings": ["", *words], "values_int64s": list(range(len(words) + 1)), "default_int64": 0},
        domain="ai.onnx.ml",
        name=f"look_up_{place}",
    )
    indices = look_up.outputs[0]
    indices.name = inner.name
    inner.replace_all_uses_with(indices, replace_graph_outputs=True)
    graph.inputs[place] = outer
    graph.append(look_up)


def _set_outputs(graph: ir.Graph, signature: Signature) -> None:
    """Give the outputs the signature's names, types and order, and add `label`.

    Each goes through an Identity, because what the module gave may be one of its inputs, a constant
    or the same tensor twice; ONNX Runtime removes those that do nothing.
    """
    values = dict(zip(_given(signature), graph.outputs, strict=True))
    graph.outputs.clear()
    for tensor in signature.outputs:
        if tensor.dtype == "BYTES":
            assert signature.labels, "checked before"
            names = ir.node("Constant", [], {"value_strings": list(signature.labels)}, name="label_names")
            likeliest = ir.node(
                "ArgMax", [values["probabilities"]], {"axis": -1, "keepdims": 0}, name="likeliest"
            )
            last = ir.node("Gather", [names.outputs[0], likeliest.outputs[0]], {"axis": 0}, name="label")
            graph.extend([names, likeliest, last])
            kind = ir.DataType.STRING
        else:
            given = values[tensor.name]
            last = ir.node("Identity", [given], name=f"give_{tensor.name}")
            graph.append(last)
            assert given.dtype is not None, "torch's exporter types every value"
            kind = given.dtype
        output = last.outputs[0]
        output.name, output.shape, output.type = tensor.name, _shape(tensor), ir.TensorType(kind)
        graph.outputs.append(output)


def _shape(tensor: Tensor) -> ir.Shape:
    return ir.Shape(
        [
            "batch" if axis == 0 else f"{tensor.name}_{axis}" if n == -1 else n
            for axis, n in enumerate(tensor.shape)
        ]
    )
