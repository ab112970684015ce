"""Image classification: a small residual network, for images of 8 to about 224 pixels a side.

The graph takes raw pixels, uint8 [B, H, W, C], so a client sends what its file holds. Groups of
channels are normalised rather than batches: a row's result must not depend on which rows share its
batch, or how many workers share that.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import torch
from pydantic import Field
from torch import nn
from torch.nn import functional

from cluster.config import Frozen
from cluster.errors import BadInput
from cluster.signature import ImageEncoding, Tensor
from training.facts import DatasetFacts
from training.task import Arrays
from training.tasks.classification import Classification

_GROUPS = 8
_INPUT = "image"


class ImageOptions(Frozen):
    """What an image classifier lets one choose."""

    width: int = Field(32, ge=8, le=1024, multiple_of=_GROUPS)
    """Channels of the first stage; each later stage has twice as many."""
    depth: int = Field(1, ge=1, le=32)
    """Residual blocks a stage."""
    augment: bool = False
    """Shift training images at random, by at most an eighth of each side."""


class ImageClassification(Classification):
    """One of several classes for each image of the column `image`."""

    name = "image-classification"
    Options = ImageOptions
    options: ImageOptions

    def __init__(self, facts: DatasetFacts, options: ImageOptions) -> None:
        super().__init__(facts, options)
        column = facts.features.get(_INPUT)
        if column is None or column.image is None:
            found = ", ".join(f"{name} ({c.kind})" for name, c in facts.features.items())
            raise BadInput(
                f"the dataset has no images in a column '{_INPUT}'",
                got=found or "no columns but the label",
                allowed=f"a column '{_INPUT}' of PNG or JPEG files",
                fix="import them: tandem data import images FOLDER OUTPUT",
            )
        self._encoding: ImageEncoding = column.image

    def inputs(self) -> tuple[Tensor, ...]:
        """`image`: uint8 [-1, height, width, channels], 0 to 255."""
        image = self._encoding
        shape = (-1, image.height, image.width, image.channels)
        return (Tensor(name=_INPUT, dtype="UINT8", shape=shape, encoding=image),)

    def build_model(self) -> nn.Module:
        """A `ResidualNet` for the dataset's image size."""
        image = self._encoding
        return ResidualNet(
            channels=image.channels,
            shorter_side=min(image.height, image.width),
            classes=len(self.facts.labels),
            width=self.options.width,
            depth=self.options.depth,
        )

    def augment(self, arrays: Arrays, rng: np.random.Generator) -> Arrays:
        """Shift each image by its own random offset; what comes in at the edge repeats the edge."""
        if not self.options.augment:
            return arrays
        images_BHWC = arrays[_INPUT]
        rows, height, width, _ = images_BHWC.shape
        reach_y, reach_x = height // 8, width // 8
        padded = np.pad(images_BHWC, ((0, 0), (reach_y, reach_y), (reach_x, reach_x), (0, 0)), mode="edge")
        y = rng.integers(0, 2 * reach_y + 1, rows)[:, None] + np.arange(height)
        x = rng.integers(0, 2 * reach_x + 1, rows)[:, None] + np.arange(width)
        return {**arrays, _INPUT: padded[np.arange(rows)[:, None, None], y[:, :, None], x[:, None, :]]}


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
        self.norm = nn.GroupNorm(_GROUPS, wide)
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
        self.norm_1 = nn.GroupNorm(_GROUPS, wide_in)
        self.conv_1 = nn.Conv2d(wide_in, wide_out, 3, stride, padding=1, bias=False)
        self.norm_2 = nn.GroupNorm(_GROUPS, wide_out)
        self.conv_2 = nn.Conv2d(wide_out, wide_out, 3, padding=1, bias=False)
        changes = wide_in != wide_out or stride != 1
        self.shortcut = nn.Conv2d(wide_in, wide_out, 1, stride, bias=False) if changes else nn.Identity()

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        h_BCHW = self.conv_1(functional.relu(self.norm_1(x_BCHW)))
        h_BCHW = self.conv_2(functional.relu(self.norm_2(h_BCHW)))
        return cast(torch.Tensor, self.shortcut(x_BCHW) + h_BCHW)
