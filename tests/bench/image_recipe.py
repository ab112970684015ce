"""The recipe and the data that the training benchmarks share: both sides read the same files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.bench.images import write_images

WORKERS = 2
GLOBAL_BATCH_ROWS = 256
EVAL_ROWS = 512


def write_recipe(
    folder: Path,
    *,
    rows: int,
    epochs: int,
    width: int,
    workers: Mapping[str, Any] | None = None,
    checkpoint: Mapping[str, Any] | None = None,
    stamps: Path | None = None,
    **more: Any,
) -> Path:
    """Data, and a recipe for it.

    Args:
        rows: a multiple of 256: torch's sampler would repeat rows otherwise.
        width: of the network.
        workers: the recipe's part; two by default.
        stamps: where the times of steps are written; None for the built-in task as it is.
        more: further fields of the recipe.
    """
    assert rows % GLOBAL_BATCH_ROWS == 0, rows
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = folder / "train", folder / "eval"
    if not train.exists():
        write_images(train, rows, seed=1)
        write_images(held_out, EVAL_ROWS, seed=2)
    task = "image-classification" if stamps is None else "tests.bench.trainers.stamped_task:StampedImages"
    recipe: dict[str, Any] = {
        "model": "bench",
        "task": task,
        "options": {"width": width, **({} if stamps is None else {"stamps": str(stamps)})},
        "data": {"train": str(train), "eval": str(held_out)},
        "store": str(folder / "store"),
        "workers": dict(workers or {"min": WORKERS, "max": WORKERS, "cpus": 1}),
        "optimization": {"global_batch_size": GLOBAL_BATCH_ROWS, "epochs": epochs},
        **({} if checkpoint is None else {"checkpoint": dict(checkpoint)}),
        **more,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path
