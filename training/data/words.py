"""Words and labels to numbers: a vocabulary's indices and a label's class.

Knows nothing of tables, tensors or which rows are refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import types as pat

_DENSE_LABELS = 4096


def encode_words(values: NDArray[Any], vocabulary: tuple[str, ...]) -> NDArray[np.int64]:
    """Indices of words: int64, of the shape of `values` (object). 0: missing or unseen; else i + 1."""
    words = pa.array(values.reshape(-1), pa.large_string())
    return word_indices(words, vocabulary).reshape(values.shape)


def word_indices(words: Any, vocabulary: tuple[str, ...]) -> NDArray[np.int64]:
    """As `encode_words`, of Arrow's strings: int64 [n]."""
    # "" means a missing value, so it is looked for in vain even in a vocabulary that has it.
    known = pa.array([word or None for word in vocabulary], pa.large_string())
    found = pc.fill_null(pc.index_in(words, known, skip_nulls=True), -1)
    return np.asarray(found.to_numpy(zero_copy_only=False), dtype=np.int64) + 1


def class_indices(column: pa.ChunkedArray, labels: tuple[str, ...]) -> NDArray[np.int64]:
    """The place of each value among `labels`: int64, -1 where it isn't one of them."""
    known = pa.array(labels, pa.large_string())
    if pat.is_large_string(column.type):
        found = pc.fill_null(pc.index_in(column, known), -1)
        return np.asarray(found.to_numpy(), dtype=np.int64)
    if pat.is_integer(column.type) and len(column) and not column.null_count:
        values = column.to_numpy()
        lowest, highest = int(values.min()), int(values.max())
        if highest - lowest < _DENSE_LABELS:
            words = pa.array(range(lowest, highest + 1), column.type).cast(pa.large_string())
            of_value = pc.fill_null(pc.index_in(words, known), -1).to_numpy(zero_copy_only=False)
            # As many bits as an index has: eight don't hold the difference of any two numbers of eight.
            wide = values if values.itemsize == 8 else values.astype(np.int64)
            places = (wide - wide.dtype.type(lowest)).astype(np.intp)
            dense: NDArray[np.int64] = np.asarray(of_value, np.int64)[places]
            return dense
    # A string is made of each distinct value only, since that takes longer than all the rest.
    encoded = pc.dictionary_encode(column.combine_chunks())
    words = encoded.dictionary.cast(pa.large_string())
    # A missing value's code is -1, so it finds the -1 that stands at the end.
    of_code = np.append(pc.fill_null(pc.index_in(words, known), -1).to_numpy(zero_copy_only=False), -1)
    codes = pc.fill_null(encoded.indices, -1).to_numpy(zero_copy_only=False)
    indices: NDArray[np.int64] = of_code.astype(np.int64)[codes]
    return indices
