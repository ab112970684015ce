"""A decoder-only transformer of GPT-2's shape, as a Tandem task, and random tokens to train it on.

Pre-norm, causal attention by torch's fused kernel, tied embeddings, no dropout. `forward` gives each
row's loss itself, so that compiling it covers the loss as well. Needs torch and `training.task` only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from cluster.signature import Signature, Tensor
from training.task import Arrays, Task, Tensors


@dataclass(frozen=True)
class Shape:
    """Of the model and its batches."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50_304
    """GPT-2's 50,257, rounded up to a multiple of 64."""
    tokens: int = 1024
    """Of a sequence."""
    rows: int = 32
    """Sequences a step."""

    @property
    def flops_per_step(self) -> float:
        """Model FLOPs: 6 for each parameter and token, and 12·layers·width·tokens of attention a token
        (PaLM, appendix B; the causal half is counted, as there)."""
        matrices = self.layers * 12 * self.width**2 + self.vocabulary * self.width
        per_token = 6 * matrices + 12 * self.layers * self.width * self.tokens
        return float(per_token * self.tokens * self.rows)


TINY = Shape(layers=2, width=64, heads=2, vocabulary=256, tokens=64, rows=8)


class Gpt(nn.Module):
    """Tokens int64 [B, T + 1] to each row's mean loss, float [B]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.token = nn.Embedding(shape.vocabulary, shape.width)
        self.place = nn.Embedding(shape.tokens, shape.width)
        self.blocks = nn.ModuleList(_Block(shape.width, shape.heads) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.weight = self.token.weight
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        input_BT, target_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
        x_BTC = self.token(input_BT) + self.place.weight[: input_BT.shape[1]]
        for block in self.blocks:
            x_BTC = block(x_BTC)
        logits_BTV = self.head(self.norm(x_BTC))
        loss_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), target_BT, reduction="none")
        return loss_BT.mean(1)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTC: torch.Tensor) -> torch.Tensor:
        rows, tokens, width = x_BTC.shape
        parts = self.qkv(self.norm_1(x_BTC)).view(rows, tokens, 3, self._heads, -1)
        q, k, v = (part.transpose(1, 2) for part in parts.unbind(2))
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTC = x_BTC + self.out(seen.transpose(1, 2).reshape(rows, tokens, width))
        return x_BTC + self.down(functional.gelu(self.up(self.norm_2(x_BTC)), approximate="tanh"))


class GptTask(Task):
    """For `training.loop`; it has no servable."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape

    def build_model(self) -> nn.Module:
        return Gpt(self._shape)

    def loss(self, model: nn.Module, batch: Tensors) -> torch.Tensor:
        loss_B: torch.Tensor = model(batch["tokens"])
        return loss_B

    def signature(self) -> Signature:
        tokens = Tensor(name="tokens", dtype="INT64", shape=(-1, self._shape.tokens + 1))
        return Signature(
            task="bench", inputs=(tokens,), outputs=(Tensor(name="loss", dtype="FP32", shape=(-1,)),)
        )


@dataclass(frozen=True)
class TokenBatch:
    """What the loop asks of a batch."""

    cursor: int
    arrays: Arrays
    weight: NDArray[np.float32]
    epoch: int = 0

    @property
    def global_rows(self) -> int:
        return len(self.weight)

    @property
    def next_cursor(self) -> int:
        return self.cursor + self.global_rows


def random_batches(shape: Shape, steps: int, cursor: int) -> Iterator[TokenBatch]:
    """As many, of the same random tokens again and again: reading data is not what is measured."""
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, shape.vocabulary, (shape.rows, shape.tokens + 1))
    weight_B = np.ones(shape.rows, np.float32)
    for number in range(steps):
        yield TokenBatch(cursor + number * shape.rows, {"tokens": tokens_BT}, weight_B)
