"""What every classifier shares: loss, outputs, labels and metrics. A subclass writes two methods.

    class MyTask(Classification):
        def build_model(self): ...      # gives logits, float [B, C]
        def inputs(self): ...           # the graph's input tensors

The graph gives `probabilities` (FP32 [-1, C]) and `label` (BYTES [-1]), the likeliest class's name.
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

CLASS_METRICS = {"accuracy": True, "log_loss": False}
"""For each, whether a higher value is better."""
_SMALLEST_PROBABILITY = 1e-15


class Classification(Task):
    """One of several classes for each row. The model gives logits: float [B, C].

    Raises:
        BadInput: from the constructor, where the label has fewer than two classes.
    """

    greater_is_better = CLASS_METRICS

    def __init__(self, facts: DatasetFacts, options: Frozen) -> None:
        super().__init__(facts, options)
        if len(facts.labels) < 2:
            raise BadInput(
                f"the column '{facts.label}' can't be classified",
                got=f"kind {facts.columns[facts.label].kind}, {len(facts.labels)} classes",
                allowed="strings or integers with at least two distinct values",
                fix="name another column as data.label, or use a regression task",
            )

    @abstractmethod
    def inputs(self) -> tuple[Tensor, ...]:
        """The graph's inputs, in the order in which the model takes them."""

    def signature(self) -> Signature:
        """The inputs, and `label` and `probabilities`."""
        return Signature(
            task=self.name or f"{type(self).__module__}:{type(self).__qualname__}",
            inputs=self.inputs(),
            outputs=class_outputs(self.facts.labels),
            labels=self.facts.labels,
        )

    def loss(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        """Cross-entropy in nats: float32 [B]."""
        from torch.nn import functional

        logits_BC = self.forward(model, batch).float()
        return functional.cross_entropy(logits_BC, batch[TARGET], reduction="none")

    def graph(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model followed by a softmax."""
        from training.tasks.networks.heads import Probabilities

        return Probabilities(model)

    def metrics(self, outputs: Arrays, target: NDArray[Any]) -> dict[str, float]:
        """Accuracy of `label`, 0 to 1; mean cross-entropy of `probabilities` in nats."""
        return class_metrics(self.facts.labels, outputs, target)


def class_outputs(labels: tuple[str, ...]) -> tuple[Tensor, ...]:
    """What a classifier's graph gives, however it was trained."""
    return (
        Tensor(name="label", dtype="BYTES", shape=(-1,)),
        Tensor(name="probabilities", dtype="FP32", shape=(-1, len(labels))),
    )


def class_metrics(labels: tuple[str, ...], outputs: Arrays, target: NDArray[Any]) -> dict[str, float]:
    """`CLASS_METRICS` of what a classifier's graph gave; `target` is each row's place among `labels`."""
    chances = outputs["probabilities"][np.arange(len(target)), target].astype(np.float64)
    return {
        "accuracy": float(np.mean(outputs["label"] == np.array(labels, dtype=object)[target])),
        "log_loss": float(-np.log(np.maximum(chances, _SMALLEST_PROBABILITY)).mean()),
    }
