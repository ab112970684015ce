"""A small residual network for images of 8 to about 224 pixels a side.

Groups of channels are normalised rather than batches: a row's result must not depend on which rows share its
batch, or how many workers share that.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import nn
from torch.nn import functional

GROUPS = 8
"""Of channels; a width must be a multiple."""


class ResidualNet(nn.Module):
    """Pixels to logits: a stem, stages of pre-activation residual blocks, a mean over positions.

    Args:
        channels: 1 or 3.
        shorter_side: of the images, in pixels; larger ones get a coarser stem and more stages, so
            that the last stage sees about 4 to 8 positions a side.
        classes: how many logits.
        width: channels of the first stage, a multiple of 8.
        depth: blocks a stage.
    """

    def __init__(self, *, channels: int, shorter_side: int, classes: int, width: int, depth: int) -> None:
        super().__init__()
        stride = 1 if shorter_side <= 48 else 2 if shorter_side <= 112 else 4
        stages = min(4, max(2, round(math.log2(max(8, shorter_side) / stride)) - 2))
        kernel = max(3, 2 * stride - 1)
        self.stem = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2)
        blocks: list[nn.Module] = []
        wide = width
        for stage in range(stages):
            for block in range(depth):
                halve = stage > 0 and block == 0
                blocks.append(_Block(wide, width << stage, stride=2 if halve else 1))
                wide = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.GroupNorm(GROUPS, wide)
        self.head = nn.Linear(wide, classes)

    def forward(self, images_BHWC: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, C] to logits, float [B, classes]."""
        pixels_BCHW = images_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1
        features_BCHW = functional.relu(self.norm(self.blocks(self.stem(pixels_BCHW))))
        return cast(torch.Tensor, self.head(features_BCHW.mean(dim=(2, 3))))


class _Block(nn.Module):
    """x + f(x), normalised before each convolution; a 1x1 convolution where the shape changes."""

    def __init__(self, wide_in: int, wide_out: int, *, stride: int) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(GROUPS, wide_in)
        self.conv_1 = nn.Conv2d(wide_in, wide_out, 3, stride, padding=1, bias=False)
        self.norm_2 = nn.GroupNorm(GROUPS, wide_out)
        self.conv_2 = nn.Conv2d(wide_out, wide_out, 3, padding=1, bias=False)
        changes = wide_in != wide_out or stride != 1
        self.shortcut = nn.Conv2d(wide_in, wide_out, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        h_BCHW = self.conv_1(functional.relu(self.norm_1(x_BCHW)))
        h_BCHW = self.conv_2(functional.relu(self.norm_2(h_BCHW)))
        return cast(torch.Tensor, self.shortcut(x_BCHW) + h_BCHW)
