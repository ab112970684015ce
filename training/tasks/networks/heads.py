"""What a graph does with a model's outputs before a client sees them."""

from __future__ import annotations

from typing import cast

import torch


class Probabilities(torch.nn.Module):
    """Logits to probabilities: float [B, C]."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.model(*inputs).softmax(dim=-1))


class Unstandardised(torch.nn.Module):
    """Standardised values to the target's own unit: float [B]."""

    def __init__(self, model: torch.nn.Module, mean: float, std: float) -> None:
        super().__init__()
        self.model, self.mean, self.std = model, mean, std

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.model(*inputs) * self.std + self.mean)
