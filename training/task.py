"""A task: a kind of problem. Users bring their own model by subclassing `Task`.

Three methods make a task: build the model, compute the loss, name the graph's inputs and outputs.
Classifiers and regressors need only two: `training.tasks.classification` and
`training.tasks.regression` know their losses, outputs and metrics.

The model takes *raw* inputs, as the signature names them, and normalises inside its `forward`, so
the exported graph holds all of the pre-processing and serving can't differ from training.

Strings are the exception, because torch has none: a BYTES input with a vocabulary reaches the model
as int64 indices (0 for missing or never seen, i + 1 for the vocabulary's i-th word); export puts the
same look-up into the graph.

Knows nothing of Ray, workers or storage. Doesn't import torch; a task that does so only inside its
methods lets its recipes be checked sooner.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import numpy as np

from training.problem import TARGET, Arrays, NoOptions, Problem

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]

__all__ = ["TARGET", "Arrays", "NoOptions", "Task", "Tensors"]


class Task(Problem):
    """A problem that a network learns by gradient descent; see `training.problem.Problem` for the rest."""

    method = "training.descent:Descent"

    @abstractmethod
    def build_model(self) -> torch.nn.Module:
        """The model, freshly initialised from torch's global generator.

        Its `forward` takes the signature's inputs, in order, and gives what `loss` and `graph` expect.
        """

    @abstractmethod
    def loss(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        """The loss of each row: float [B], not reduced.

        Args:
            model: what `build_model` gave, perhaps wrapped for data parallelism; call it.
            batch: the inputs by name, and the target under `TARGET`.
        """

    def forward(self, model: torch.nn.Module, batch: Tensors) -> Any:
        """Call the model on the batch's inputs, in the signature's order."""
        return model(*(batch[name] for name in self.input_names))

    def graph(self, model: torch.nn.Module) -> torch.nn.Module:
        """The module to export: takes the signature's inputs in order, gives its outputs in order.

        An output `label` (BYTES) is not given by the module: export derives it from `probabilities`
        and the signature's labels. The default is the model itself.
        """
        return model

    @property
    def augments(self) -> bool:
        """Whether `augment` may change a row; where it can't, it isn't called."""
        return type(self).augment is not Task.augment

    def augment(self, arrays: Arrays, rng: np.random.Generator) -> Arrays:
        """Change training inputs at random. The default does nothing.

        Called in the loader's threads with one row at a time (axis 0 has length 1, no target), and a
        generator of that row's own, so that the outcome doesn't depend on batches or workers.
        """
        return arrays
