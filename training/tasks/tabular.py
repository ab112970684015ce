"""Tabular classification and regression: numbers and categories, any of which may be missing.

The graph takes one tensor a column: numbers as FP32 [-1] with NaN for missing, categories as BYTES
[-1] with "" for missing. Standardising, filling in and looking up happen inside the model, with the
training data's statistics, so serving needs nothing but the raw row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from cluster.config import Frozen
from cluster.errors import BadInput
from cluster.signature import Tensor
from training.facts import DatasetFacts
from training.task import Arrays, Task
from training.tasks.classification import Classification
from training.tasks.regression import Regression

if TYPE_CHECKING:
    from torch import nn


class TabularOptions(Frozen):
    """What a tabular task lets one choose."""

    width: int = Field(128, ge=1, le=8192)
    """Features of each residual block."""
    depth: int = Field(2, ge=0, le=64)
    """Residual blocks."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of each block's features dropped in training."""
    exclude: tuple[str, ...] = ()
    """Columns not to learn from, such as a row's id."""


class _Tabular(Task):
    """What both tasks share: which columns, and the network behind the outputs."""

    Options = TabularOptions
    options: TabularOptions

    def __init__(self, facts: DatasetFacts, options: TabularOptions) -> None:
        super().__init__(facts, options)
        unknown = [name for name in options.exclude if name not in facts.features]
        if unknown:
            raise BadInput(
                "'exclude' names columns that aren't there",
                got=", ".join(unknown),
                allowed=", ".join(facts.features),
                fix="correct 'options.exclude'",
            )
        self._columns = {name: c for name, c in facts.features.items() if name not in options.exclude}
        unfit = [f"{n} ({c.kind})" for n, c in self._columns.items() if c.kind not in ("number", "category")]
        if unfit or not self._columns:
            raise BadInput(
                "the dataset is not a table that can be learnt from",
                got=", ".join(unfit) or "no columns but the label",
                allowed="columns of numbers and categories",
                fix="name the columns to leave out: options.exclude",
            )

    def inputs(self) -> tuple[Tensor, ...]:
        """One nullable tensor a column: FP32 [-1] or BYTES [-1]."""
        return tuple(
            Tensor(
                name=name, dtype="FP32" if column.kind == "number" else "BYTES", shape=(-1,), nullable=True
            )
            for name, column in self._columns.items()
        )

    def vocabularies(self) -> dict[str, tuple[str, ...]]:
        """Each category column's words, as the training data has them."""
        return {
            name: tuple(word for word in column.categories or () if word)
            for name, column in self._columns.items()
            if column.kind == "category"
        }

    def example_inputs(self, rows: int, rng: np.random.Generator) -> Arrays:
        """As the base class, with each number drawn around its column's own mean."""
        examples = super().example_inputs(rows, rng)
        for name, column in self._columns.items():
            if column.kind == "number":
                around = examples[name] * (column.std or 1.0) + (column.mean or 0.0)
                examples[name] = around.astype(np.float32)
        return examples

    def _network(self, outputs: int | None) -> nn.Module:
        from training.tasks.networks.tabular import TabularNet

        words = self.vocabularies()
        columns = [(c, len(words.get(name, ()))) for name, c in self._columns.items()]
        options = self.options
        return TabularNet(
            columns, outputs=outputs, width=options.width, depth=options.depth, dropout=options.dropout
        )


class TabularClassification(_Tabular, Classification):
    """One of several classes for each row of a table."""

    name = "tabular-classification"

    def build_model(self) -> nn.Module:
        """A `TabularNet` with a logit for each class."""
        return self._network(len(self.facts.labels))


class TabularRegression(_Tabular, Regression):
    """A number for each row of a table."""

    name = "tabular-regression"

    def build_model(self) -> nn.Module:
        """A `TabularNet` with one value a row."""
        return self._network(None)
