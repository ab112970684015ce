"""A forest as an ONNX graph that takes raw columns, words among them, and gives labels or values.

The trees become one `TreeEnsemble` (ai.onnx.ml 5), whose splits know missing values and sets of categories,
so nothing is approximated: the graph takes the way through each tree that XGBoost takes. onnxmltools was
weighed: it converts to the older operators, which have no sets, refuses categories, and would be one more
package to keep at XGBoost's pace.

    a number    FP32 [batch], NaN where missing          as it is
    a category  STRING [batch], "" where missing         its place in the vocabulary; NaN for any other word

Knows nothing of XGBoost itself, files or tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import DTypeLike, NDArray
from onnx import TensorProto, helper, numpy_helper

from cluster.signature import Signature, Tensor
from training.trees.forest import LEAF, Forest, Tree

OPSET = 20
ML_OPSET = 5
_IR_VERSION = 10
_ML = "ai.onnx.ml"
_BRANCH_BELOW, _BRANCH_MEMBER = 1, 6
_SUM = 1


def forest_graph(forest: Forest, signature: Signature, vocabularies: Mapping[str, tuple[str, ...]]) -> bytes:
    """The graph, serialised: the same forest gives the same bytes.

    Args:
        signature: its inputs are the columns that the trees split on, in the order of the features.
        vocabularies: of each BYTES input, the words, in the order of their codes.
    """
    given = {tensor.name for tensor in (*signature.inputs, *signature.outputs)}
    nodes = _Nodes(given)
    columns = [_column(nodes, tensor, vocabularies.get(tensor.name)) for tensor in signature.inputs]
    features = nodes.add("Concat", columns, axis=1)
    sums = nodes.add("TreeEnsemble", [features], domain=_ML, **_ensemble(forest))
    margins = nodes.add("Add", [sums, nodes.constant(np.ascontiguousarray(forest.base))])
    _give(nodes, margins, forest.objective, signature)
    graph = helper.make_graph(
        nodes.nodes,
        "trees",
        [_value(tensor) for tensor in signature.inputs],
        [_value(tensor) for tensor in signature.outputs],
        nodes.constants,
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(_ML, ML_OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, producer_name="tandem")
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString(deterministic=True))


class _Nodes:
    """A graph in the making; what it makes is numbered, and called like no tensor in `taken`."""

    def __init__(self, taken: set[str]) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._taken = taken
        self._count = 0

    def add(self, kind: str, inputs: Sequence[str], *, gives: str | None = None, **attributes: Any) -> str:
        """One node; gives the name of what it makes."""
        name = gives or self._name()
        self.nodes.append(helper.make_node(kind, inputs, [name], f"n{len(self.nodes)}", **attributes))
        return name

    def constant(self, values: NDArray[Any]) -> str:
        name = self._name()
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def _name(self) -> str:
        while (name := f"v{self._count}") in self._taken:
            self._count += 1
        self._count += 1
        return name


def _value(tensor: Tensor) -> Any:
    kind = TensorProto.STRING if tensor.dtype == "BYTES" else TensorProto.FLOAT
    return helper.make_tensor_value_info(tensor.name, kind, ["batch", *tensor.shape[1:]])


def _column(nodes: _Nodes, tensor: Tensor, words: Sequence[str] | None) -> str:
    """One input as a float column [batch, 1]; gives its name."""
    source = tensor.name
    if words is not None:
        source = nodes.add(
            "LabelEncoder",
            [source],
            domain=_ML,
            # "" stands for missing, and keeps the list from being empty, which the operator doesn't allow.
            keys_strings=["", *words],
            values_floats=[float("nan"), *(float(code) for code in range(len(words)))],
            default_float=float("nan"),
        )
    return nodes.add("Unsqueeze", [source, nodes.constant(np.array([1], np.int64))])


class _Rows:
    """The attributes of a `TreeEnsemble`, filled one tree after another."""

    def __init__(self) -> None:
        self.modes: list[int] = []
        self.splits: list[float] = []
        self.members: list[float] = []
        self.leaf_outputs: list[int] = []
        self.leaf_values: list[float] = []
        self.roots: list[int] = []
        self.features: list[int] = []
        self.missing_true: list[int] = []
        self.children: dict[bool, list[int]] = {True: [], False: []}
        self.child_is_leaf: dict[bool, list[int]] = {True: [], False: []}

    def add(self, tree: Tree) -> None:
        splits = np.flatnonzero(tree.left != LEAF).tolist()
        first = len(self.modes)
        self.roots.append(first)
        if not splits:  # the operator has no tree without a split: this one's children are alike
            self._split(0, _BRANCH_BELOW, 0.0, missing_true=True)
            for side in (True, False):
                self._leaf(side, tree, 0)
            return
        places = {node: first + place for place, node in enumerate(splits)}
        for node in splits:
            members = tree.categories.get(node)
            goes_left = bool(tree.missing_goes_left[node])
            if members is None:
                true, false = tree.left[node], tree.right[node]
                split = float(tree.threshold[node])
                self._split(int(tree.feature[node]), _BRANCH_BELOW, split, missing_true=goes_left)
            else:
                true, false = tree.right[node], tree.left[node]
                self._split(int(tree.feature[node]), _BRANCH_MEMBER, 0.0, missing_true=not goes_left)
                self.members += [*map(float, members), float("nan")]  # each set ends with a NaN
            for side, child in ((True, int(true)), (False, int(false))):
                if child in places:
                    self.children[side].append(places[child])
                    self.child_is_leaf[side].append(0)
                else:
                    self._leaf(side, tree, child)

    def _split(self, feature: int, mode: int, split: float, *, missing_true: bool) -> None:
        self.features.append(feature)
        self.modes.append(mode)
        self.splits.append(split)
        self.missing_true.append(int(missing_true))

    def _leaf(self, side: bool, tree: Tree, node: int) -> None:
        self.children[side].append(len(self.leaf_values))
        self.child_is_leaf[side].append(1)
        self.leaf_outputs.append(tree.output)
        self.leaf_values.append(float(tree.threshold[node]))


def _ensemble(forest: Forest) -> dict[str, Any]:
    """Its attributes."""
    rows = _Rows()
    for tree in forest.trees:
        rows.add(tree)

    def tensor(values: Sequence[float], dtype: DTypeLike) -> Any:
        return numpy_helper.from_array(np.array(values, dtype))

    return {
        "n_targets": forest.outputs,
        "aggregate_function": _SUM,
        "post_transform": 0,
        "tree_roots": rows.roots,
        "nodes_featureids": rows.features,
        "nodes_modes": tensor(rows.modes, np.uint8),
        "nodes_splits": tensor(rows.splits, np.float32),
        "nodes_truenodeids": rows.children[True],
        "nodes_trueleafs": rows.child_is_leaf[True],
        "nodes_falsenodeids": rows.children[False],
        "nodes_falseleafs": rows.child_is_leaf[False],
        "nodes_missing_value_tracks_true": rows.missing_true,
        "leaf_targetids": rows.leaf_outputs,
        "leaf_weights": tensor(rows.leaf_values, np.float32),
    } | ({"membership_values": tensor(rows.members, np.float32)} if rows.members else {})


def _give(nodes: _Nodes, margins: str, objective: str, signature: Signature) -> None:
    """From margins [batch, outputs] to the signature's outputs."""
    if not signature.labels:
        nodes.add("Squeeze", [margins, nodes.constant(np.array([1], np.int64))], gives="value")
        return
    if objective.startswith("binary:"):
        likely = nodes.add("Sigmoid", [margins])
        unlikely = nodes.add("Sigmoid", [nodes.add("Neg", [margins])])
        nodes.add("Concat", [unlikely, likely], gives="probabilities", axis=1)
    else:
        nodes.add("Softmax", [margins], gives="probabilities", axis=1)
    names = nodes.constant(np.array(signature.labels, dtype=object))
    likeliest = nodes.add("ArgMax", ["probabilities"], axis=-1, keepdims=0)
    nodes.add("Gather", [names, likeliest], gives="label", axis=0)
