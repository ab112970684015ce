"""Training by hand under torchrun, on the same recipe: what `tandem train` is measured beside.

No checkpoints, no exact resume, no export.

    torchrun --standalone --nproc-per-node 2 -m tests.bench.trainers.torchrun_ddp RECIPE.yaml [STEPS]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cluster.config import load_yaml
from tests.bench.trainers.by_hand import ByHand
from training.recipe import Recipe

LOG_EVERY_STEPS = 10


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--loader-processes", type=int, default=1)
    parser.add_argument("--steps", type=int, help="end after so many")
    chosen = parser.parse_args()
    recipe = load_yaml(Recipe, chosen.recipe, [])
    started_s = time.monotonic()
    dist.init_process_group("gloo")
    grouped_s = time.monotonic()
    rank, world = dist.get_rank(), dist.get_world_size()
    training = ByHand(recipe, rank, world, chosen.loader_processes)
    batch = recipe.optimization.global_batch_size
    first_s = last_s = built_s = time.monotonic()
    for loss in training.steps(DistributedDataParallel(training.model)):
        last_s = time.monotonic()
        if training.step == 1:
            first_s = last_s
        if training.step % LOG_EVERY_STEPS == 0 and rank == 0:
            sys.stderr.write(f"step {training.step}/{training.total_steps}  loss {loss.item():.4f}\n")
        if training.step == chosen.steps:
            break
    if rank == 0:
        found = {
            "steps": training.step,
            "samples_per_s": (training.step - 1) * batch / max(last_s - first_s, 1e-9),
            "imported_at_s": started_s,
            "grouped_at_s": grouped_s,
            "built_at_s": built_s,
            "first_step_at_s": first_s,
        }
        sys.stdout.write(json.dumps(found) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
