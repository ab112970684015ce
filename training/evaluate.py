"""Measure a servable on held-out data: every row once, in order, in ONNX Runtime.

What is measured is what will be served, pre-processing and all, never the torch module. An older
version can be measured on the same data, as long as it answers the same question.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import BadInput, shown
from cluster.signature import Signature
from training.data.columns import input_arrays, target_array
from training.data.dataset import Dataset
from training.gate import Incomparable
from training.problem import Arrays, Problem
from training.servable import Servable

_DECODING_THREADS = 4


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a servable is worth: the task's metrics over `rows` rows."""

    metrics: dict[str, float]
    rows: int
    duration_s: float


def evaluate(
    servable_files: Mapping[str, bytes],
    dataset: Dataset,
    task: Problem,
    batch_rows: int = 256,
    *,
    clock: Clock = SYSTEM_CLOCK,
) -> Evaluation:
    """Run a servable over a dataset.

    Args:
        servable_files: its files by name; its own signature decides what it is given.
        dataset: the held-out data. Rows are read as they are needed; outputs are kept till the end.
        task: computes the metrics, and knows the training data's labels.

    Raises:
        BadInput: the servable's outputs or labels aren't the task's, a column it takes is missing, or
            a row can't be used; says which.
        StorageError: the data can't be read.
    """
    started_s = clock.monotonic_s()
    servable = Servable(servable_files)
    _check_outputs(servable.signature, task.signature())
    columns = list(dict.fromkeys([*(t.name for t in servable.signature.inputs), task.facts.label]))
    batches: list[Arrays] = []
    targets: list[NDArray[Any]] = []
    with ThreadPoolExecutor(_DECODING_THREADS, "tandem-decode") as pool:
        for start in range(0, dataset.rows, batch_rows):
            row_ids = np.arange(start, min(start + batch_rows, dataset.rows))
            table = dataset.read_rows(row_ids, columns)
            inputs = input_arrays(table, servable.signature, pool=pool, row_ids=row_ids)
            batches.append(servable.run(inputs))
            targets.append(target_array(table, task.facts, row_ids=row_ids))
    outputs = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    metrics = task.metrics(outputs, np.concatenate(targets))
    _check_metrics(metrics, task)
    return Evaluation(metrics, dataset.rows, clock.monotonic_s() - started_s)


def evaluate_live(
    servable_files: Mapping[str, bytes], dataset: Dataset, task: Problem, batch_rows: int = 256
) -> Evaluation | Incomparable:
    """As `evaluate`, for the live version, which an earlier task and earlier data may have made.

    Raises:
        StorageError: the data can't be read.
    """
    try:
        return evaluate(servable_files, dataset, task, batch_rows)
    except BadInput as error:
        return Incomparable(f"{error.failed} ({error.got})" if error.got else error.failed)


def _check_outputs(found: Signature, wanted: Signature) -> None:
    outputs = {tensor.name: tensor for tensor in found.outputs}
    for tensor in wanted.outputs:
        other = outputs.get(tensor.name)
        if other is None or (other.dtype, other.shape) != (tensor.dtype, tensor.shape):
            raise BadInput(
                f"the servable doesn't give the task's output '{tensor.name}'",
                got=f"{other.dtype} {list(other.shape)}" if other else f"only {', '.join(outputs)}",
                allowed=f"{tensor.dtype} {list(tensor.shape)}",
                fix="measure it with the task that made it",
            )
    if found.labels != wanted.labels:
        raise BadInput(
            "the servable has other classes than the task",
            got=shown(found.labels),
            allowed=shown(wanted.labels),
            fix="measure it on data with its own classes",
        )


def _check_metrics(metrics: Mapping[str, float], task: Problem) -> None:
    if set(metrics) != set(task.greater_is_better):
        raise BadInput(
            "the task's metrics() gives other metrics than greater_is_better names",
            got=", ".join(sorted(metrics)) or "none",
            allowed=", ".join(sorted(task.greater_is_better)) or "none",
            fix="make the two agree",
        )
