"""LitServe with batching, its fast (ZeroMQ) queue, and a worker and an API server for each core.

Run as `python lit_mlp.py PORT`.
"""

from __future__ import annotations

import sys

import litserve
import numpy as np
from mlp import MAX_BATCH_SIZE, Mlp
from numpy.typing import NDArray

CORES = 2
BATCH_TIMEOUT_S = 0.005


class Api(litserve.LitAPI):  # type: ignore[misc]
    """POST /predict {"features": [64 numbers]} gives {"scores": [10 numbers]}."""

    def setup(self, device: str) -> None:
        self._mlp = Mlp()

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # FastAPI would read a type
        return np.asarray(request["features"], np.float32)

    def batch(self, inputs: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        return np.stack(inputs)

    def predict(self, features_BF: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._mlp(features_BF)

    def unbatch(self, output: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        return list(output)

    def encode_response(self, output: NDArray[np.float32]) -> dict[str, list[float]]:
        return {"scores": output.tolist()}


def main(port: int) -> None:
    api = Api(max_batch_size=MAX_BATCH_SIZE, batch_timeout=BATCH_TIMEOUT_S)
    server = litserve.LitServer(
        api,
        accelerator="cpu",
        workers_per_device=CORES,
        fast_queue=True,
    )
    server.run(
        host="127.0.0.1",
        port=port,
        num_api_servers=CORES,
        log_level="warning",
        generate_client_file=False,
        access_log=False,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
