"""One training in which every way of saving takes its turn: same processes, same state, same disk.

About 100 million fp32 parameters under AdamW, so 1.2 GB of state, on two gloo workers. A turn is a few
quiet steps, one save, and steps until what was saved is stored. Each way says how long `save` blocked and
how long every step took. Runs inside Ray Train's workers, because one of the peers is Ray Train.

    python -m tests.bench.trainers.saving --address HOST:PORT --folder FOLDER --rounds 6
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.bench.trainers.ways import WAYS, Training, Way

WORKERS = 2
ROWS = 4
STEPS_AT_MOST = 80
"""After a save, even if it isn't stored yet."""


class Turn:
    """The clock of one rank's steps."""

    def __init__(self, training: Training, wrapped: nn.Module, features: int) -> None:
        self._training = training
        self._wrapped = wrapped
        self._input_BF = torch.randn(ROWS, features)

    def steps(self, count: int, way: Way | None = None) -> list[float]:
        """Take so many; what each took, in seconds. `way` is told."""
        return [self._step(way) for _ in range(count)]

    def steps_until_stored(self, way: Way) -> list[float]:
        """Step until every rank's part is stored; at least one step where the save is asynchronous."""
        taken: list[float] = []
        while not _all(way.stored()) and len(taken) < STEPS_AT_MOST:
            taken.append(self._step(way))
        return taken

    def _step(self, way: Way | None) -> float:
        started_s = time.monotonic()
        self._wrapped(self._input_BF).square().mean().backward()
        self._training.optimizer.step()
        self._training.optimizer.zero_grad(set_to_none=True)
        self._training.step += 1
        step_s = time.monotonic() - started_s
        if way is not None:
            way.stepped(step_s)
        return step_s


def save_worker(config: dict[str, Any]) -> list[dict[str, Any]]:
    """What every worker runs. Gives, for each turn after the first of each way, what it cost."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank, world = dist.get_rank(), dist.get_world_size()
    model = nn.Sequential(*_layers(config["layers"], config["features"]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    training = Training(model, optimizer, rank, world)
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    turn = Turn(training, wrapped, config["features"])
    turn.steps(2)
    folder = Path(config["folder"])
    ways = [WAYS[name](training, folder / name, config["store"]) for name in config["ways"]]
    found = []
    for number in range(config["rounds"] + 1):
        # Turned round each time, so that nobody always comes after the same neighbour.
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            cost = one_turn(turn, way, config["quiet_steps"])
            if number > 0:  # the first makes buffers and processes that later ones use again
                found.append({"round": number, "way": way.name, **cost})
            _clean(folder / way.name, rank)
    for way in ways:
        way.close()
    return found


def one_turn(turn: Turn, way: Way, quiet_steps: int) -> dict[str, Any]:
    """Quiet steps, a save, and steps until it is stored."""
    quiet_s = turn.steps(quiet_steps, way)
    dist.barrier()
    started_s = time.monotonic()
    way.save()
    blocked_s = time.monotonic() - started_s
    upload_s = turn.steps_until_stored(way)
    return {
        "quiet_s": quiet_s,
        "blocked_s": _longest(blocked_s),
        "upload_s": upload_s,
        "stored_s": time.monotonic() - started_s,
    }


def _layers(count: int, features: int) -> Iterator[nn.Module]:
    for _ in range(count):
        yield nn.Linear(features, features)
        yield nn.ReLU()


def _all(mine: bool) -> bool:
    flag = torch.tensor(float(mine))
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return bool(flag)


def _longest(seconds: float) -> float:
    value = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return float(value)


def _clean(folder: Path, rank: int) -> None:
    """Nothing of one turn is left on the disk, or on its way there, when the next begins."""
    dist.barrier()
    if rank == 0:
        for path in folder.glob("step-*"):
            shutil.rmtree(path)
        os.sync()
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--store", default="", help="URI of the store that Tandem saves to; else a folder")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quiet-steps", type=int, default=6)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--features", type=int, default=2048)
    chosen = parser.parse_args()
    ray.init(address=chosen.address, logging_level="ERROR", log_to_driver=False)
    result = TorchTrainer(
        save_worker,
        train_loop_config={**vars(chosen), "ways": chosen.ways.split(",")},
        scaling_config=ScalingConfig(num_workers=WORKERS),
        run_config=RunConfig(name="saving", storage_path=chosen.folder),
    ).fit()
    sys.stdout.write("\n" + json.dumps({"turns": result.return_value}) + "\n")


if __name__ == "__main__":
    main()
