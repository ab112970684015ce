"""Numbers and categories, any of which may be missing, to outputs.

Standardising, filling in and looking up happen inside, with the training data's statistics.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional

from training.facts import ColumnFacts

_FARTHEST_DEVIATIONS = 10.0
"""Numbers are clipped here: one absurd value must not swamp every other column."""


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
