"""Tabular classification and regression: numbers and categories, any of which may be missing.

The graph takes one tensor a column: numbers as FP32 [-1] with NaN for missing, categories as BYTES
[-1] with "" for missing. Standardising, filling in and looking up happen inside the model, with the
training data's statistics, so serving needs nothing but the raw row.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from cluster.config import Frozen
from cluster.errors import BadInput
from cluster.signature import Tensor
from training.facts import ColumnFacts, DatasetFacts
from training.task import Arrays, Task
from training.tasks.classification import Classification
from training.tasks.regression import Regression

_FARTHEST_DEVIATIONS = 10.0
"""Numbers are clipped here: one absurd value must not swamp every other column."""


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


class TabularNet(nn.Module):
    """Raw columns to outputs: standardise and embed, then a residual multi-layer perceptron.

    A missing number counts as the mean. Where the training data has missing numbers in a column, an
    indicator says so too; elsewhere there would be nothing to learn it from.

    Args:
        columns: each column's facts, and for a category how many words it has.
        outputs: how many values a row; None for a single one without an axis of its own.
        width, depth, dropout: see `TabularOptions`.
    """

    def __init__(
        self,
        columns: list[tuple[ColumnFacts, int]],
        *,
        outputs: int | None,
        width: int,
        depth: int,
        dropout: float,
    ) -> None:
        super().__init__()
        numbers = [(place, column) for place, (column, _) in enumerate(columns) if column.kind == "number"]
        self._numbers = [place for place, _ in numbers]
        self._categories = [place for place in range(len(columns)) if place not in set(self._numbers)]
        self._indicated = [place for place, column in numbers if column.missing_rows]
        # Not persistent: they come from the facts, which every process has, and are no state to train.
        means = torch.tensor([column.mean or 0.0 for _, column in numbers])
        deviations = torch.tensor([_deviation(column) for _, column in numbers])
        self.register_buffer("_mean_F", means, persistent=False)
        self.register_buffer("_std_F", deviations, persistent=False)
        self.embeddings = nn.ModuleList(
            # Row 0 stands for missing and unseen; without missing rows to learn it from it stays zero.
            nn.Embedding(words + 1, _embedding_width(words), padding_idx=None if column.missing_rows else 0)
            for column, words in (columns[place] for place in self._categories)
        )
        features = len(numbers) + len(self._indicated)
        features += sum(_embedding_width(columns[place][1]) for place in self._categories)
        self.stem = nn.Linear(features, width)
        self.blocks = nn.Sequential(*(_Block(width, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs or 1)
        self._one_value = outputs is None

    def forward(self, *columns: torch.Tensor) -> torch.Tensor:
        """Columns as the signature orders them, float32 [B] or int64 [B], to float [B, outputs] or [B]."""
        parts = [
            embed(columns[place]) for embed, place in zip(self.embeddings, self._categories, strict=True)
        ]
        if self._numbers:
            raw_BF = torch.stack([columns[place] for place in self._numbers], dim=1)
            mean_F, std_F = cast(torch.Tensor, self._mean_F), cast(torch.Tensor, self._std_F)
            near_BF = ((raw_BF - mean_F) / std_F).clamp(-_FARTHEST_DEVIATIONS, _FARTHEST_DEVIATIONS)
            parts.append(near_BF.masked_fill(torch.isnan(near_BF), 0.0))
        parts += [torch.isnan(columns[place]).float().unsqueeze(1) for place in self._indicated]
        h_BW = self.stem(torch.cat(parts, dim=1))
        values = self.head(self.norm(self.blocks(h_BW)))
        return cast(torch.Tensor, values.squeeze(1) if self._one_value else values)


class _Block(nn.Module):
    """x + f(x), normalised before its two layers."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.rise = nn.Linear(width, 2 * width)
        self.fall = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BW: torch.Tensor) -> torch.Tensor:
        h_BW = functional.gelu(self.rise(self.norm(x_BW)))
        return cast(torch.Tensor, x_BW + self.fall(self.dropout(h_BW)))


def _deviation(column: ColumnFacts) -> float:
    """What to divide by: 1 where float32 can't tell the column from a constant."""
    std, mean = column.std or 0.0, column.mean or 0.0
    return std if std > 1e-6 * abs(mean) else 1.0


def _embedding_width(words: int) -> int:
    """Enough to tell the words apart; more would only be harder to learn."""
    return min(32, max(2, (words + 1) // 2))
