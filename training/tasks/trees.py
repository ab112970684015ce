"""Gradient-boosted trees on tables: the same columns and answers as the tabular networks.

What is learnt follows from the label: classes where it has some, a quantity where it is a number. Columns
are taken as they are: trees need no standardising, and send a missing value or a word that they have never
seen the way that a missing one went in training.

Columns are not sampled, nor rows: XGBoost's generator can't be put back to where it was, and a run that is
resumed must be the run that was not interrupted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from numpy.typing import NDArray
from pydantic import Field

from cluster.config import Frozen
from cluster.errors import BadInput, shown
from cluster.signature import Signature
from training.facts import DatasetFacts
from training.problem import Arrays
from training.tasks.classification import CLASS_METRICS, class_metrics, class_outputs
from training.tasks.regression import VALUE_METRICS, VALUE_OUTPUTS, quantity_facts, value_metrics
from training.tasks.table import Table, TableOptions

if TYPE_CHECKING:
    from training.recipe import Recipe


class EarlyStopping(Frozen):
    """Stop when held-back rows get no better; the best round is what is exported."""

    rounds: int = Field(20, ge=1)
    """After so many rounds without an improvement."""
    share: float = Field(0.1, gt=0, le=0.5)
    """Of the training rows, held back for it. The evaluation data is the gate's alone."""


class TreesOptions(TableOptions):
    """What `boosted-trees` lets one choose."""

    objective: Literal["auto", "classification", "regression"] = "auto"
    """`auto` takes labels that are strings, booleans or at most 1,000 distinct integers for classes."""
    rounds: int = Field(300, ge=1, le=100_000)
    """Each adds a tree, or one for every class where there are more than two."""
    depth: int = Field(6, ge=1, le=16)
    """Of a tree, at most."""
    eta: float = Field(0.1, gt=0, le=1)
    """How much of what each tree says is taken."""
    min_child_weight: float = Field(1.0, ge=0)
    """The least sum of second derivatives in a leaf: for a regression, of rows."""
    min_split_loss: float = Field(0.0, ge=0)
    """What a split must gain at least."""
    l2: float = Field(1.0, ge=0)
    l1: float = Field(0.0, ge=0)
    bins: int = Field(256, ge=2, le=65_535)
    """Into how many a column's numbers are sorted: the thresholds that are tried."""
    early_stopping: EarlyStopping | None = None
    memory_gib: float = Field(4.0, gt=0)
    """A worker whose share takes more, sorted into bins, keeps it on its disk and reads it every round."""


class BoostedTrees(Table):
    """Classes or a quantity for each row of a table, by boosted trees."""

    name = "boosted-trees"
    method = "training.trees.method:Boosting"
    Options = TreesOptions
    options: TreesOptions

    def __init__(self, facts: DatasetFacts, options: TreesOptions) -> None:
        label = facts.columns[facts.label]
        wanted = options.objective
        self.classifies = wanted == "classification" or (wanted == "auto" and label.kind == "category")
        if self.classifies and len(facts.labels) < 2:
            raise _unfit(facts, f"kind {label.kind}, {len(facts.labels)} classes", "at least two classes")
        if not self.classifies and label.mean is None:
            raise _unfit(facts, f"kind {label.kind}", "numbers, for a regression")
        super().__init__(facts if self.classifies else quantity_facts(facts), options)
        self.greater_is_better = CLASS_METRICS if self.classifies else VALUE_METRICS

    def signature(self) -> Signature:
        """The same as the tabular networks'."""
        labels = self.facts.labels
        outputs = class_outputs(labels) if self.classifies else VALUE_OUTPUTS
        return Signature(task=self.name, inputs=self.inputs(), outputs=outputs, labels=labels or None)

    def metrics(self, outputs: Arrays, target: NDArray[Any]) -> dict[str, float]:
        """The same as the tabular networks'."""
        if self.classifies:
            return class_metrics(self.facts.labels, outputs, target)
        return value_metrics(outputs, target)

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse what says nothing to trees: they know no batches and no learning rate of an optimizer.

        Raises:
            BadInput: names the field.
        """
        optimization = recipe.optimization
        for name, field in type(optimization).model_fields.items():
            value = getattr(optimization, name)
            if name not in ("seed", "global_batch_size") and value != field.default:
                raise _says_nothing(f"optimization.{name}", value, "rounds, depth, eta and others in options")
        if recipe.strategy != "ddp":
            raise _says_nothing("strategy", recipe.strategy, "ddp: each worker has its share of the rows")
        if recipe.initialize_from is not None:
            raise _says_nothing("initialize_from", recipe.initialize_from.version, "a network's task")
        if recipe.workers.gpus:
            raise _says_nothing("workers.gpus", recipe.workers.gpus, "workers with CPUs")


def _unfit(facts: DatasetFacts, got: str, allowed: str) -> BadInput:
    return BadInput(
        f"the column '{facts.label}' can't be learnt by these trees",
        got=got,
        allowed=allowed,
        fix="name another column as data.label, or set options.objective",
    )


def _says_nothing(name: str, value: object, allowed: str) -> BadInput:
    return BadInput(
        f"'{name}' says nothing to boosted trees",
        got=shown(value),
        allowed=allowed,
        fix=f"leave out {name}",
    )
