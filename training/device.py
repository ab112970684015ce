"""What a worker's steps run on."""

from __future__ import annotations

import torch

from training.recipe import Recipe


def worker_device(recipe: Recipe) -> torch.device:
    """What this process's steps run on."""
    return torch.device("cuda", torch.cuda.current_device()) if recipe.workers.gpus else torch.device("cpu")
