"""From a booster to a servable, checked against the booster itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import xgboost as xgb
from numpy.typing import NDArray

from training.data.words import encode_words
from training.parity import check_parity
from training.problem import Arrays
from training.servable import GRAPH_FILE, SIGNATURE_FILE, Servable
from training.tasks.trees import BoostedTrees
from training.trees.forest import LEAF, Forest, read_forest
from training.trees.graph import forest_graph

_CHECKED_ROWS = (1, 2, 5, 300)


def export_booster(trees: BoostedTrees, booster: xgb.Booster, rounds: int | None) -> dict[str, bytes]:
    """A booster's servable: `graph.onnx` and `signature.json`.

    Args:
        rounds: only the first so many; all without it.

    Raises:
        TandemError: the graph gives other answers than the booster.
    """
    signature = trees.signature()
    forest = read_forest(bytes(booster.save_raw("json")), rounds)
    files = {
        GRAPH_FILE: forest_graph(forest, signature, trees.vocabularies()),
        SIGNATURE_FILE: signature.model_dump_json(indent=1, exclude_none=True).encode(),
    }
    servable = Servable(files)
    rng = np.random.default_rng(0)
    for rows in _CHECKED_ROWS:
        arrays = _telling(trees, forest, rows, rng)
        expected = predicted(trees, booster, arrays, rounds)
        check_parity(signature, [expected], servable.run(arrays), rows)
    return files


def predicted(
    trees: BoostedTrees, booster: xgb.Booster, arrays: Arrays, rounds: int | None = None
) -> NDArray[np.float32]:
    """What XGBoost itself says of raw inputs: float32 [B, classes], or [B] for a regression."""
    words = trees.vocabularies()
    columns = [_feature(arrays[name], words.get(name)) for name in trees.input_names]
    kinds = ["q" if column.kind == "number" else "c" for column in trees.columns.values()]
    matrix = xgb.DMatrix(np.stack(columns, axis=1), feature_types=kinds, enable_categorical=True)
    answers: NDArray[np.float32] = booster.predict(matrix, iteration_range=(0, rounds or 0))
    if len(trees.facts.labels) == 2:
        return np.stack([1 - answers, answers], axis=1)
    return answers


def _telling(trees: BoostedTrees, forest: Forest, rows: int, rng: np.random.Generator) -> Arrays:
    """Inputs that would show a mistake: of the numbers, every other one is one of the thresholds."""
    arrays = trees.example_inputs(rows, rng)
    for feature, name in enumerate(trees.input_names):
        if trees.columns[name].kind == "number":
            found = [tree.threshold[(tree.feature == feature) & (tree.left != LEAF)] for tree in forest.trees]
            thresholds = np.concatenate(found) if found else np.empty(0, np.float32)
            if len(thresholds):
                exact = rng.random(rows) < 0.5
                arrays[name][exact] = rng.choice(thresholds, int(exact.sum()))
    return arrays


def _feature(values: NDArray[Any], words: tuple[str, ...] | None) -> NDArray[np.float32]:
    if words is None:
        return values.astype(np.float32)
    codes = encode_words(values, words).astype(np.float32) - 1
    codes[codes < 0] = np.nan
    return codes
