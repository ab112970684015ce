"""Tandem's own image classification, with the time of each step's beginning written down.

Used in recipes as `tests.bench.trainers.stamped_task:StampedImages`.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from tests.bench.trainers.stamps import Stamps
from training.task import Tensors
from training.tasks.image import ImageClassification, ImageOptions


class StampedOptions(ImageOptions):
    """What an image classifier lets one choose, and where the stamps go."""

    stamps: str


class StampedImages(ImageClassification):
    """As `image-classification`."""

    name = ""
    Options = StampedOptions
    options: StampedOptions
    _stamps: tuple[int, Stamps] | None = None

    def loss(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        """As the original's; only training calls it, once a step."""
        if self._stamps is None or self._stamps[0] != os.getpid():  # a process may be forked
            rank = dist.get_rank() if dist.is_initialized() else 0
            self._stamps = (os.getpid(), Stamps(Path(self.options.stamps), rank))
        self._stamps[1].begin()
        return super().loss(model, batch)
