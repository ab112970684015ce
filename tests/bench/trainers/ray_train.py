"""Training on a Ray cluster as Ray Train's own guides write it: `TorchTrainer`, `report`, `get_checkpoint`.

Rank 0 saves model and optimizer with torch.save every few steps and hands the folder to `report`; a
group that Ray starts anew loads the latest. What it learnt is one JSON line on stdout at the end.

    python -m tests.bench.trainers.ray_train RECIPE.yaml --address HOST:PORT [--steps N] [--stamps FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model

from cluster.config import load_yaml
from tests.bench.trainers.by_hand import ByHand
from tests.bench.trainers.stamps import Stamps
from training.recipe import Recipe

STATE = "state.pt"


def train_worker(config: dict[str, Any]) -> dict[str, float]:
    """What every worker runs; when it reached what."""
    entered_s = time.monotonic()
    recipe = Recipe.model_validate(config["recipe"])
    context = ray.train.get_context()
    rank = context.get_world_rank()
    training = ByHand(recipe, rank, context.get_world_size(), loader_processes=0)
    wrapped = prepare_model(training.model)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        _load(training, checkpoint)
    built_s = time.monotonic()
    begin = Stamps(Path(config["stamps"]), rank).begin if config["stamps"] else None
    facts = {"entered_at_s": entered_s, "built_at_s": built_s, "restored_step": training.step}
    for _ in training.steps(wrapped, begin):
        facts.setdefault("first_step_at_s", time.monotonic())
        if training.step == config["steps"]:
            break
        if training.step % config["save_every_steps"] == 0:
            _save(training, rank)
    return facts


def _save(training: ByHand, rank: int) -> None:
    metrics = {"step": training.step}
    if rank != 0:
        ray.train.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        state = {
            "model": training.model.state_dict(),
            "optimizer": training.optimizer.state_dict(),
            "step": training.step,
            "epoch": training.epoch,
        }
        torch.save(state, Path(folder, STATE))  # noqa: TID251 - what the peer's users write
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder))


def _load(training: ByHand, checkpoint: Checkpoint) -> None:
    with checkpoint.as_directory() as folder:
        state = torch.load(Path(folder, STATE), weights_only=True)  # noqa: TID251 - as above
    training.model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])
    training.step, training.epoch = state["step"], state["epoch"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--address", required=True)
    parser.add_argument("--storage", required=True, help="where checkpoints go")
    parser.add_argument("--name", required=True, help="of the run")
    parser.add_argument("--stamps", default="", help="a folder for the times of the steps")
    parser.add_argument("--steps", type=int, default=0, help="end after so many; 0 for all")
    parser.add_argument("--save-every-steps", type=int, default=1_000_000)
    chosen = parser.parse_args()
    recipe = load_yaml(Recipe, chosen.recipe, [])
    imported_s = time.monotonic()
    ray.init(address=chosen.address, logging_level="ERROR", log_to_driver=False)
    connected_s = time.monotonic()
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "stamps": chosen.stamps,
            "steps": chosen.steps,
            "save_every_steps": chosen.save_every_steps,
        },
        scaling_config=ScalingConfig(
            num_workers=recipe.workers.max, resources_per_worker={"CPU": recipe.workers.cpus}
        ),
        run_config=RunConfig(
            name=chosen.name,
            storage_path=chosen.storage,
            failure_config=FailureConfig(max_failures=recipe.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=recipe.checkpoint.keep),
        ),
    )
    result = trainer.fit()
    found = {**(result.return_value or {}), "imported_at_s": imported_s, "connected_at_s": connected_s}
    sys.stdout.write("\n" + json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
