"""From a table's columns to the arrays that a model or a servable takes."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cluster.signature import Signature
from training.facts import DatasetFacts
from training.task import Arrays


def input_arrays(
    table: pa.Table,
    signature: Signature,
    *,
    pool: Executor | None = None,
    row_ids: NDArray[np.int64] | None = None,
) -> Arrays:
    """Raw inputs, exactly as the servable takes them, by the signature's names; axis 0 is the row.

    Images are decoded to uint8 [B, H, W, C]; numbers become the tensor's dtype, NaN for missing;
    strings become an object array of str, "" for missing.

    Args:
        pool: decodes images in parallel; without it they are decoded here.
        row_ids: int64 [B], how errors name the rows; without it, places in `table`.

    Raises:
        BadInput: a column is missing, or a value isn't what the signature takes; names row and value.
    """
    raise NotImplementedError


def target_array(
    table: pa.Table, facts: DatasetFacts, *, row_ids: NDArray[np.int64] | None = None
) -> NDArray[Any]:
    """The label column: int64 [B] class indices, or float32 [B] for a regression.

    Raises:
        BadInput: a label that is missing, or isn't one of the facts' labels; names row and value.
    """
    raise NotImplementedError


def encode_words(values: NDArray[Any], vocabulary: tuple[str, ...]) -> NDArray[np.int64]:
    """Indices of words: int64 [B] from object [B]. 0: missing ("" or None) or unseen; else i + 1."""
    raise NotImplementedError


def model_arrays(
    table: pa.Table,
    signature: Signature,
    vocabularies: Mapping[str, tuple[str, ...]],
    facts: DatasetFacts,
    *,
    pool: Executor | None = None,
    row_ids: NDArray[np.int64] | None = None,
) -> Arrays:
    """What the model takes in training: the inputs, words encoded, and the target under `TARGET`."""
    raise NotImplementedError
