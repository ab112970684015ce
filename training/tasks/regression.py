"""What every regressor shares: loss, output and metrics. A subclass writes two methods.

    class MyTask(Regression):
        def build_model(self): ...      # gives standardised values, float [B]
        def inputs(self): ...           # the graph's input tensors

The model works on a target of mean 0 and deviation 1, whatever its unit; the graph turns what it
gives back into the target's own unit, as `value` (FP32 [-1]).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cluster.config import Frozen
from cluster.errors import BadInput
from cluster.signature import Signature, Tensor
from training.facts import DatasetFacts
from training.task import TARGET, Arrays, Task, Tensors

if TYPE_CHECKING:
    import torch

VALUE_METRICS = {"r2": True, "rmse": False, "mae": False}
"""For each, whether a higher value is better."""
VALUE_OUTPUTS = (Tensor(name="value", dtype="FP32", shape=(-1,)),)
"""What a regressor's graph gives, however it was trained."""


class Regression(Task):
    """A number for each row. The model gives it standardised: float [B].

    Raises:
        BadInput: from the constructor, where the label isn't a number.
    """

    greater_is_better = VALUE_METRICS

    def __init__(self, facts: DatasetFacts, options: Frozen) -> None:
        label = facts.columns[facts.label]
        if label.mean is None or label.std is None:
            raise BadInput(
                f"the column '{facts.label}' has no mean to regress to",
                got=f"kind {label.kind}",
                allowed="a column of numbers",
                fix="name another column as data.label, or use a classification task",
            )
        super().__init__(quantity_facts(facts), options)
        self._mean = label.mean
        self._std = label.std or 1.0

    @abstractmethod
    def inputs(self) -> tuple[Tensor, ...]:
        """The graph's inputs, in the order in which the model takes them."""

    def signature(self) -> Signature:
        """The inputs, and `value`."""
        return Signature(
            task=self.name or f"{type(self).__module__}:{type(self).__qualname__}",
            inputs=self.inputs(),
            outputs=VALUE_OUTPUTS,
        )

    def loss(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        """Squared error in squared deviations of the target: float32 [B]."""
        values_B: torch.Tensor = self.forward(model, batch).float()
        return (values_B - (batch[TARGET] - self._mean) / self._std).square()

    def graph(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model, then back to the target's own unit."""
        from training.tasks.networks.heads import Unstandardised

        return Unstandardised(model, self._mean, self._std)

    def metrics(self, outputs: Arrays, target: NDArray[Any]) -> dict[str, float]:
        """As `value_metrics`."""
        return value_metrics(outputs, target)


def value_metrics(outputs: Arrays, target: NDArray[Any]) -> dict[str, float]:
    """Coefficient of determination; root mean squared and mean absolute error in the target's unit.

    Where the target is constant, r2 is 1 for exact values and 0 for any others.
    """
    truth = target.astype(np.float64)
    errors = outputs["value"].astype(np.float64) - truth
    unexplained = float(np.square(errors).sum())
    total = float(np.square(truth - truth.mean()).sum())
    return {
        "r2": 1 - unexplained / total if total else float(unexplained == 0),
        "rmse": float(np.sqrt(np.square(errors).mean())),
        "mae": float(np.abs(errors).mean()),
    }


def quantity_facts(facts: DatasetFacts) -> DatasetFacts:
    """The facts with the label as a number: integers with few values look like classes, but who asks for a
    regression means a quantity."""
    number = facts.columns[facts.label].model_copy(update={"kind": "number", "categories": None})
    return facts.model_copy(update={"columns": {**facts.columns, facts.label: number}})
