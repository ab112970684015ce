"""A dataset of 28 x 28 grey images for the training benchmark: scikit-learn's digits, made larger.

Each image is one of the 1,797 real digits, scaled, shifted and made noisy, as a PNG; so there are as
many rows as wanted, and the network has something to learn.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

SIDE = 28
ROWS_PER_GROUP = 2048


def write_images(folder: Path, rows: int, seed: int) -> Path:
    """One Parquet file in `folder`: `image` (PNG) and `label` (0 to 9). The same for the same seed."""
    rng = np.random.Generator(np.random.PCG64(seed))
    digits = load_digits()
    chosen = rng.integers(0, len(digits.target), rows)
    table = pa.table(
        {
            "image": pa.array([_png(_varied(digits.images[index], rng)) for index in chosen], pa.binary()),
            "label": pa.array(digits.target[chosen], pa.int64()),
        }
    )
    folder.mkdir(parents=True)
    pq.write_table(table, folder / "images.parquet", row_group_size=ROWS_PER_GROUP)
    return folder


def _varied(digit: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.uint8]:
    """float [8, 8], 0 to 16, to uint8 [28, 28]."""
    larger = Image.fromarray((digit * 15.9).astype(np.uint8)).resize((24, 24), Image.Resampling.BILINEAR)
    y, x = rng.integers(0, SIDE - 24 + 1, 2)
    canvas = np.zeros((SIDE, SIDE))
    canvas[y : y + 24, x : x + 24] = np.asarray(larger)
    noisy: NDArray[np.uint8] = np.clip(canvas + rng.normal(0, 12, canvas.shape), 0, 255).astype(np.uint8)
    return noisy


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
