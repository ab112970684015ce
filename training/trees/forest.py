"""A booster's trees as plain numbers, read from XGBoost's own JSON.

What a tree means (XGBoost 3.2, doc/model.schema and `src/tree/`): at a split on a number, a row goes left
where its value is below the threshold; at a split on a category, it goes *right* where its category is in
the split's set; where the value is missing (NaN), it goes as the split says. The leaves that a row ends in
are summed for each output, on top of the booster's base score.

Knows neither ONNX nor how trees are grown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

LEAF = -1


@dataclass(frozen=True, slots=True)
class Tree:
    """One tree of n nodes, of which number 0 is the root. Arrays are of length n."""

    output: int
    """Which of the booster's outputs its leaves count for."""
    left: NDArray[np.int64]
    """Children; `LEAF` where there are none."""
    right: NDArray[np.int64]
    feature: NDArray[np.int64]
    threshold: NDArray[np.float32]
    """Of a split on a number; of a leaf, its value."""
    missing_goes_left: NDArray[np.bool_]
    categories: dict[int, tuple[int, ...]]
    """Of each node that splits on a category, the codes that go right."""


@dataclass(frozen=True, slots=True)
class Forest:
    """A booster: the margins are `base` plus the leaves of `trees`, summed in their order."""

    objective: str
    """XGBoost's name, such as `binary:logistic`."""
    base: NDArray[np.float32]
    """float32 [outputs], as margins."""
    trees: tuple[Tree, ...]

    @property
    def outputs(self) -> int:
        """Margins a row."""
        return len(self.base)


def read_forest(saved: bytes, rounds: int | None = None) -> Forest:
    """A booster of `gbtree`.

    Args:
        saved: what `Booster.save_raw("json")` gives.
        rounds: only the first so many; all without it.
    """
    learner = orjson.loads(saved)["learner"]
    parameters, objective = learner["learner_model_param"], learner["objective"]["name"]
    model = learner["gradient_booster"]["model"]
    outputs = max(1, int(parameters["num_class"]))
    scores = np.asarray(orjson.loads(_as_json(parameters["base_score"])), np.float64)
    if objective.startswith("binary:"):  # kept as a probability
        scores = np.log(scores) - np.log1p(-scores)
    ends = model["iteration_indptr"]
    count = ends[-1] if rounds is None else ends[min(rounds, len(ends) - 1)]
    trees = zip(model["trees"][:count], model["tree_info"][:count], strict=True)
    return Forest(
        objective=objective,
        base=np.broadcast_to(scores.astype(np.float32), outputs),
        trees=tuple(_tree(tree, output) for tree, output in trees),
    )


def _as_json(score: str) -> str:
    """`[5E-1,1E0]`, or a single number as older releases have it, as a list."""
    return score if score.startswith("[") else f"[{score}]"


def _tree(tree: dict[str, Any], output: int) -> Tree:
    sets = zip(tree["categories_nodes"], tree["categories_segments"], tree["categories_sizes"], strict=True)
    return Tree(
        output=output,
        left=np.asarray(tree["left_children"], np.int64),
        right=np.asarray(tree["right_children"], np.int64),
        feature=np.asarray(tree["split_indices"], np.int64),
        threshold=np.asarray(tree["split_conditions"], np.float32),
        missing_goes_left=np.asarray(tree["default_left"], np.bool_),
        categories={node: tuple(tree["categories"][start : start + size]) for node, start, size in sets},
    )
