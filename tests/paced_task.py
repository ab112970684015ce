"""A task that takes its time until a test lets it hurry, so that a run is as long as a fault takes.

Used as `paced_task:PacedTask`; rows are written down as `recording_task` says.
"""

from __future__ import annotations

import time
from pathlib import Path

import recording_task
import torch
from recording_task import RecordingTask

from training.task import Tensors

HURRY = "hurry"


class Options(recording_task.Options):
    pace_s: float = 0.1
    """Slept in each step, until there is a file `hurry` in `log_dir`."""


class PacedTask(RecordingTask):
    """Steps of `pace_s`, then as fast as it can."""

    Options = Options
    options: Options

    def loss(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        loss = super().loss(model, batch)
        if not (Path(self.options.log_dir) / HURRY).exists():
            time.sleep(self.options.pace_s)
        return loss
