"""A problem: what is asked of a model, whichever way it is trained.

A problem knows its graph's inputs and outputs, the vocabularies of its words, and how its answers are
measured. How the model comes about is its *method* (`training.method`): gradient descent for a
`training.task.Task`, boosting for `training.tasks.trees`. Evaluation, the gate and whoever checks a recipe
need no more than is here.

Knows nothing of Ray, workers, storage, torch or XGBoost.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cluster.config import Frozen
from cluster.errors import BadInput, shown
from cluster.signature import NUMPY_DTYPES, Signature, Tensor
from training.facts import DatasetFacts

if TYPE_CHECKING:
    from training.recipe import Recipe

Arrays = dict[str, NDArray[Any]]

TARGET = "__target__"
"""The name under which the label stands in a batch beside the inputs: int64 or float32 [B]."""


_EXAMPLE_AXIS = 8
"""The length that an axis of any length has in `example_inputs`."""


class NoOptions(Frozen):
    """A problem with nothing to choose."""


class Problem(ABC):
    """A kind of problem, bound to one dataset's facts and the recipe's options.

    Built anew in each process from the same arguments; the constructor must be cheap and must not
    read data. Subclasses declare what may be chosen as a pydantic model in `Options`.

    Raises:
        BadInput: from the constructor, if the dataset or the options don't suit the task.
    """

    Options: ClassVar[type[Frozen]] = NoOptions
    name: ClassVar[str] = ""
    """What recipes call the task; a user's own goes by `package.module:Class`."""
    method: ClassVar[str]
    """What trains it, as `module:Class`: a `training.method.Method`, imported only where training is done."""
    greater_is_better: Mapping[str, bool] = {}
    """For each metric that `metrics` gives, whether a higher value is better."""

    def __init__(self, facts: DatasetFacts, options: Frozen) -> None:
        self.facts = facts
        self.options = options

    @abstractmethod
    def signature(self) -> Signature:
        """The graph's inputs and outputs."""

    def check(self) -> None:
        """Is the signature one that a graph can have? Asked before training starts.

        Raises:
            BadInput: it isn't; names the tensor.
        """
        try:
            signature = self.signature()
        except ValidationError as error:
            raise BadInput(
                "the task's signature is not right",
                got=shown(error.errors()[0]["input"]),
                allowed=error.errors()[0]["msg"].removeprefix("Value error, "),
                fix="correct the task's signature(), or the names of the columns",
            ) from None
        _check_inputs(signature, self.vocabularies())
        _check_outputs(signature)

    def check_recipe(self, recipe: Recipe) -> None:  # noqa: B027 - most suit any recipe
        """Refuse, before training starts, what in a recipe says nothing to the method. Raises: BadInput."""

    @cached_property
    def input_names(self) -> tuple[str, ...]:
        """The names of the signature's inputs, in order."""
        return tuple(tensor.name for tensor in self.signature().inputs)

    def vocabularies(self) -> dict[str, tuple[str, ...]]:
        """For each BYTES input, the words that are looked up: distinct, none empty."""
        return {}

    def example_inputs(self, rows: int, rng: np.random.Generator) -> Arrays:
        """Plausible inputs for checking the graph, and tracing it, missing values among them.

        The default draws numbers from a standard normal, bytes evenly, and words from the vocabulary
        and outside it. Override it where only some values make sense, such as indices below a bound.
        """
        words = self.vocabularies()
        return {t.name: _example(t, words.get(t.name, ()), rows, rng) for t in self.signature().inputs}

    def metrics(self, outputs: Arrays, target: NDArray[Any]) -> dict[str, float]:
        """What the gate looks at, over the whole of the held-out data: all of `greater_is_better`.

        The default measures nothing, so a recipe with a gate is refused.

        Args:
            outputs: what the servable gave, by name.
            target: the label column as `target_array` gives it.
        """
        return {}


def _check_inputs(signature: Signature, words: Mapping[str, tuple[str, ...]]) -> None:
    for tensor in signature.inputs:
        if (tensor.dtype == "BYTES") != (tensor.name in words):
            raise BadInput(
                f"the input '{tensor.name}' can't be put into a graph",
                got=f"{tensor.dtype} {'with' if tensor.name in words else 'without'} a vocabulary",
                allowed="a vocabulary for each BYTES input and for no other",
                fix="correct the task's vocabularies()",
            )


def _check_outputs(signature: Signature) -> None:
    names = {tensor.name for tensor in signature.outputs}
    for tensor in signature.outputs:
        if signature.input(tensor.name) is not None:
            raise BadInput(
                f"'{tensor.name}' is an input and an output",
                got=f"a column called '{tensor.name}', like what the model gives",
                allowed="a name for each tensor of a graph",
                fix=f"rename the column '{tensor.name}', or leave it out",
            )
        derived = tensor.name == "label" and signature.labels and "probabilities" in names
        if tensor.dtype == "BYTES" and not derived:
            raise BadInput(
                f"the output '{tensor.name}' can't be put into a graph",
                got="BYTES",
                allowed="'label', with the signature's labels and an output 'probabilities'",
                fix="correct the task's signature()",
            )


def _example(tensor: Tensor, words: tuple[str, ...], rows: int, rng: np.random.Generator) -> NDArray[Any]:
    shape = (rows, *(_EXAMPLE_AXIS if n == -1 else n for n in tensor.shape[1:]))
    values: NDArray[Any]
    if tensor.dtype == "BYTES":
        return rng.choice(np.array([*words, "", "\ufffenever seen"], dtype=object), size=shape)
    if tensor.dtype.startswith("FP"):
        values = rng.standard_normal(shape)
        if tensor.nullable:
            values[rng.random(shape) < 0.2] = np.nan
    else:
        values = rng.integers(0, 256 if tensor.dtype == "UINT8" else 2, shape)
    return values.astype(NUMPY_DTYPES[tensor.dtype])
