"""Data-parallel training by hand, as a careful user writes it: the peer that must not be slower than needed.

The same model (built by the task), optimizer, schedule, clipping, batch and number of steps as the
recipe's. The data is a torch `Dataset` behind a `DistributedSampler` and a `DataLoader`: images are
decoded as they are needed. No exact resume: a run that is continued goes on at the beginning of the
epoch it was in. Knows nothing of who starts the processes (torchrun_ddp.py, ray_train.py).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from training.data.dataset import Dataset as TandemDataset
from training.loop import new_state
from training.recipe import Recipe
from training.schedule import learning_rate
from training.tasks import build_task

Row = tuple[torch.Tensor, torch.Tensor]


class ParquetImages(Dataset[Row]):
    """Rows of a table: uint8 [H, W, 1] and an int64 label."""

    def __init__(self, folder: Path) -> None:
        table: pa.Table = pq.read_table(folder)
        self._images = table["image"].combine_chunks()
        self._labels = table["label"].to_numpy()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Row:
        pixels = np.array(Image.open(io.BytesIO(self._images[index].as_py())))
        return torch.from_numpy(pixels).unsqueeze(-1), torch.tensor(self._labels[index])


class ByHand:
    """One worker's training. `model` and `optimizer` are the whole state, with `step` and `epoch`.

    Args:
        loader_processes: that decode beside the training process; 0 decodes in it.
    """

    def __init__(self, recipe: Recipe, rank: int, world: int, loader_processes: int) -> None:
        torch.set_num_threads(1)
        self._settings = recipe.optimization
        self._world = world
        data = ParquetImages(Path(recipe.data.train.removeprefix("file://")))
        self._sampler: DistributedSampler[Any] = DistributedSampler(
            data, world, rank, seed=self._settings.seed
        )
        self._loader = DataLoader(
            data,
            batch_size=self._settings.global_batch_size // world,
            sampler=self._sampler,
            num_workers=loader_processes,
            persistent_workers=loader_processes > 0,
        )
        facts = TandemDataset.open(recipe.data.train).facts(recipe.data.label)
        # A task with stamps has the options of the one it is derived from, and one more.
        options = {name: value for name, value in recipe.options.items() if name != "stamps"}
        task = build_task("image-classification", facts, options)
        state = new_state(task, self._settings, torch.device("cpu"))
        self.model = state.model
        self.optimizer = state.optimizer
        self.step = 0
        self.epoch = 0

    @property
    def total_steps(self) -> int:
        """Of the whole training."""
        return self._settings.epochs * len(self._loader)

    def steps(self, wrapped: nn.Module, begin: Callable[[int], None] | None = None) -> Iterator[torch.Tensor]:
        """Take every step from here to the end; yields each one's loss, on this rank's rows.

        Args:
            wrapped: `model`, made data-parallel.
            begin: called before each step's forward pass, with the number of steps done.
        """
        for epoch in range(self.epoch, self._settings.epochs):
            self.epoch = epoch
            self._sampler.set_epoch(epoch)
            for images_BHWC, labels_B in self._loader:
                if begin is not None:
                    begin(self.step)
                for group in self.optimizer.param_groups:
                    group["lr"] = learning_rate(self.step, self.total_steps, self._settings)
                loss = functional.cross_entropy(wrapped(images_BHWC), labels_B)
                loss.backward()  # type: ignore[no-untyped-call]
                if self._settings.gradient_clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._settings.gradient_clip_norm)
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                self.step += 1
                yield loss
