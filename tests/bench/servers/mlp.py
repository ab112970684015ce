"""The zero-cost model as every peer runs it: one ONNX Runtime session with one thread.

Stands beside the servers because it is imported in their environments, where Tandem isn't installed.
"""

from __future__ import annotations

import os

import numpy as np
import onnxruntime
from numpy.typing import NDArray

MAX_BATCH_SIZE = 64
"""Tandem's own default."""


class Mlp:
    """The graph at `$BENCH_MODEL`."""

    def __init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            os.environ["BENCH_MODEL"], options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, features_BF: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [B, 64] to float32 [B, 10]."""
        scores_BK: NDArray[np.float32] = self._session.run(["scores"], {"features": features_BF})[0]
        return scores_BK
