"""Tabular classification and regression: numbers and categories, any of which may be missing.

The graph takes one tensor a column: numbers as FP32 [-1] with NaN for missing, categories as BYTES
[-1] with "" for missing. Standardising, filling in and looking up happen inside the model, with the
training data's statistics, so serving needs nothing but the raw row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from training.task import Task
from training.tasks.classification import Classification
from training.tasks.regression import Regression
from training.tasks.table import Table, TableOptions

if TYPE_CHECKING:
    from torch import nn


class TabularOptions(TableOptions):
    """What a tabular task lets one choose."""

    width: int = Field(128, ge=1, le=8192)
    """Features of each residual block."""
    depth: int = Field(2, ge=0, le=64)
    """Residual blocks."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of each block's features dropped in training."""


class _Tabular(Table, Task):
    """What both tasks share: the network behind the outputs."""

    Options = TabularOptions
    options: TabularOptions

    def _network(self, outputs: int | None) -> nn.Module:
        from training.tasks.networks.tabular import TabularNet

        words = self.vocabularies()
        columns = [(c, len(words.get(name, ()))) for name, c in self.columns.items()]
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
