"""BentoML with a batchable API on the sleeping device. `$BENCH_MAX_LATENCY_MS` is its one limit.

Run as `bentoml serve bento_device:Model`.
"""

from __future__ import annotations

import os

import bentoml
import device
import numpy as np
from numpy.typing import NDArray


@bentoml.service(
    workers=1,
    threads=4,
    logging={"access": {"enabled": False}},
    traffic={"timeout": 60, "max_concurrency": 100_000},
)
class Model:
    """POST /predict {"due": [[T]]} gives [[T]]."""

    @bentoml.api(
        batchable=True,
        max_batch_size=device.MAX_ROWS,
        max_latency_ms=int(os.environ.get("BENCH_MAX_LATENCY_MS", "300")),
    )
    def predict(self, due: NDArray[np.float64]) -> NDArray[np.float64]:
        device.run(due[:, 0].tolist())
        return due
