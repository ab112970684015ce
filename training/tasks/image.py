"""Image classification: a small residual network, for images of 8 to about 224 pixels a side.

The graph takes raw pixels, uint8 [B, H, W, C], so a client sends what its file holds. The network itself is
`training.tasks.networks.residual`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from cluster.config import Frozen
from cluster.errors import BadInput
from cluster.signature import ImageEncoding, Tensor
from training.facts import DatasetFacts
from training.task import Arrays
from training.tasks.classification import Classification

if TYPE_CHECKING:
    from torch import nn

_INPUT = "image"


class ImageOptions(Frozen):
    """What an image classifier lets one choose."""

    width: int = Field(32, ge=8, le=1024, multiple_of=8)
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
        from training.tasks.networks.residual import ResidualNet

        image = self._encoding
        return ResidualNet(
            channels=image.channels,
            shorter_side=min(image.height, image.width),
            classes=len(self.facts.labels),
            width=self.options.width,
            depth=self.options.depth,
        )

    @property
    def augments(self) -> bool:
        """Only where the options ask for it."""
        return self.options.augment

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
