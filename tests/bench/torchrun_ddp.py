"""What a good engineer writes without Tandem: data-parallel training under `torchrun`, in one file.

The same model (built by the task), optimizer, schedule, clipping, batch and number of steps as the
recipe's. The data is a torch `Dataset` behind a `DistributedSampler` and a `DataLoader`: images are
decoded as they are needed, in the loader's one process a worker (none, two, or decoding all before the
first step were no faster on two cores). No checkpoints, no exact resume, no export.

    torchrun --standalone --nproc-per-node 2 -m tests.bench.torchrun_ddp RECIPE.yaml
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from cluster.config import load_yaml
from training.dataset import Dataset as TandemDataset
from training.loop import new_state
from training.recipe import Recipe
from training.schedule import learning_rate
from training.tasks import build_task

LOG_EVERY_STEPS = 10
LOADER_PROCESSES = 1
Row = tuple[torch.Tensor, torch.Tensor]


class ParquetImages(Dataset[Row]):
    """Rows of a table: uint8 [H, W, 1] and an int64 label."""

    def __init__(self, table: pa.Table) -> None:
        self._images = table["image"].combine_chunks()
        self._labels = table["label"].to_numpy()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Row:
        pixels = np.array(Image.open(io.BytesIO(self._images[index].as_py())))
        return torch.from_numpy(pixels).unsqueeze(-1), torch.tensor(self._labels[index])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    recipe = load_yaml(Recipe, parser.parse_args().recipe, [])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    folder = Path(recipe.data.train.removeprefix("file://"))
    data = ParquetImages(pq.read_table(folder))
    settings = recipe.optimization
    sampler: DistributedSampler[Any] = DistributedSampler(data, world, rank, seed=settings.seed)
    loader = DataLoader(
        data,
        batch_size=settings.global_batch_size // world,
        sampler=sampler,
        num_workers=LOADER_PROCESSES,
        persistent_workers=True,
    )
    facts = TandemDataset.open(recipe.data.train).facts(recipe.data.label)
    task = build_task(recipe.task, facts, recipe.options)
    state = new_state(task, settings, torch.device("cpu"))
    model = DistributedDataParallel(state.model)
    optimizer = state.optimizer

    total_steps = settings.epochs * len(loader)
    step, rows = 0, 0
    first_at, first_s = "", 0.0
    for epoch in range(settings.epochs):
        sampler.set_epoch(epoch)
        for images_BHWC, labels_B in loader:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total_steps, settings)
            loss = functional.cross_entropy(model(images_BHWC), labels_B)
            loss.backward()  # type: ignore[no-untyped-call]
            if settings.gradient_clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            if step == 1:
                first_at, first_s = datetime.now(UTC).isoformat(), time.monotonic()
            else:
                rows += len(labels_B) * world
            if step % LOG_EVERY_STEPS == 0 and rank == 0:
                sys.stderr.write(f"step {step}/{total_steps}  loss {loss.item():.4f}\n")
    if rank == 0:
        seconds = time.monotonic() - first_s
        facts_found = {"steps": step, "samples_per_s": rows / seconds, "first_step_at": first_at}
        sys.stdout.write(json.dumps(facts_found) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
