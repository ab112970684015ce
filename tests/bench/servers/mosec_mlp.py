"""Mosec: its Rust front forms the batches and hands them to a Python worker.

Run as `python mosec_mlp.py --port PORT`; Mosec reads its own arguments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from mlp import MAX_BATCH_SIZE, Mlp
from mosec import Server, Worker

MAX_WAIT_MS = 1


class Model(Worker):  # type: ignore[misc]
    """POST /inference {"features": [64 numbers]} gives {"scores": [10 numbers]}."""

    def __init__(self) -> None:
        super().__init__()
        self._mlp = Mlp()

    def forward(self, data: list[dict[str, Any]]) -> list[dict[str, list[float]]]:
        scores_BK = self._mlp(np.asarray([item["features"] for item in data], np.float32))
        return [{"scores": scores} for scores in scores_BK.tolist()]


if __name__ == "__main__":
    server = Server()
    server.append_worker(Model, max_batch_size=MAX_BATCH_SIZE, max_wait_time=MAX_WAIT_MS)
    server.run()
