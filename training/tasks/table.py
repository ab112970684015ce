"""What every task on tables shares, whichever way it is trained: numbers and categories, any of them missing.

The graph takes one tensor a column: numbers as FP32 [-1] with NaN for missing, categories as BYTES
[-1] with "" for missing.
"""

from __future__ import annotations

import numpy as np

from cluster.config import Frozen
from cluster.errors import BadInput
from cluster.signature import Tensor
from training.facts import DatasetFacts
from training.problem import Arrays, Problem


class TableOptions(Frozen):
    """What every such task lets one choose."""

    exclude: tuple[str, ...] = ()
    """Columns not to learn from, such as a row's id."""


class Table(Problem):
    """Rows of a table: which columns there are, and what the graph takes of them."""

    options: TableOptions

    def __init__(self, facts: DatasetFacts, options: TableOptions) -> None:
        super().__init__(facts, options)
        unknown = [name for name in options.exclude if name not in facts.features]
        if unknown:
            raise BadInput(
                "'exclude' names columns that aren't there",
                got=", ".join(unknown),
                allowed=", ".join(facts.features),
                fix="correct 'options.exclude'",
            )
        self.columns = {name: c for name, c in facts.features.items() if name not in options.exclude}
        unfit = [f"{n} ({c.kind})" for n, c in self.columns.items() if c.kind not in ("number", "category")]
        if unfit or not self.columns:
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
            for name, column in self.columns.items()
        )

    def vocabularies(self) -> dict[str, tuple[str, ...]]:
        """Each category column's words, as the training data has them."""
        return {
            name: tuple(word for word in column.categories or () if word)
            for name, column in self.columns.items()
            if column.kind == "category"
        }

    def example_inputs(self, rows: int, rng: np.random.Generator) -> Arrays:
        """As the base class, with each number drawn around its column's own mean."""
        examples = super().example_inputs(rows, rng)
        for name, column in self.columns.items():
            if column.kind == "number":
                around = examples[name] * (column.std or 1.0) + (column.mean or 0.0)
                examples[name] = around.astype(np.float32)
        return examples
