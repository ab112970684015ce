"""BentoML with a batchable API: its adaptive batching, one worker a core, no access log.

Run as `bentoml serve bento_mlp:Model`.
"""

from __future__ import annotations

import bentoml
import numpy as np
from mlp import MAX_BATCH_SIZE, Mlp
from numpy.typing import NDArray

CORES = 2


@bentoml.service(workers=CORES, logging={"access": {"enabled": False}})
class Model:
    """POST /predict {"features": [[64 numbers]]} gives [[10 numbers]]."""

    def __init__(self) -> None:
        self._mlp = Mlp()

    @bentoml.api(batchable=True, max_batch_size=MAX_BATCH_SIZE)
    def predict(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._mlp(np.asarray(features, np.float32))
