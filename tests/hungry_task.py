"""A task that asks for far too much memory at one step: each time, or the first time only.

Used as `hungry_task:HungryTask`; rows are written down as `recording_task` says.
"""

from __future__ import annotations

from pathlib import Path

import paced_task
import torch
from paced_task import PacedTask

from training.task import Tensors


class Options(paced_task.Options):
    eats_mib: int = 0
    row: float = 0.0
    """In whose batch."""
    once: bool = False


class HungryTask(PacedTask):
    """Touches `eats_mib` of memory in the batch that has a certain row."""

    Options = Options
    options: Options

    def loss(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        loss = super().loss(model, batch)
        eaten = Path(self.options.log_dir) / "eaten"
        if bool((batch["id"] == self.options.row).any()) and not (self.options.once and eaten.exists()):
            eaten.touch()
            torch.ones(self.options.eats_mib << 20, dtype=torch.uint8)
        return loss
