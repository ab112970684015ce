"""Ray Serve as its documentation shows dynamic batching, with every setting at its default.

Run as `python serve_batch.py [--tuned] PORT`. `--tuned` raises the limits that the documentation
says to raise when requests are batched.
"""

from __future__ import annotations

import signal
import sys

import numpy as np
import ray
from mlp import MAX_BATCH_SIZE, Mlp
from ray import serve
from starlette.requests import Request

TUNED_IN_FLIGHT = 1000
TUNED_WAIT_S = 0.005


@serve.deployment
class Model:
    """POST / {"features": [64 numbers]} gives {"scores": [10 numbers]}."""

    def __init__(self, tuned: bool) -> None:
        self._mlp = Mlp()
        if tuned:
            self.predict.set_max_batch_size(MAX_BATCH_SIZE)
            self.predict.set_batch_wait_timeout_s(TUNED_WAIT_S)

    @serve.batch
    async def predict(self, rows: list[list[float]]) -> list[list[float]]:
        scores: list[list[float]] = self._mlp(np.asarray(rows, np.float32)).tolist()
        return scores

    async def __call__(self, request: Request) -> dict[str, list[float]]:
        body = await request.json()
        return {"scores": await self.predict(body["features"])}


def main(port: int, tuned: bool) -> None:
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    model = Model.options(max_ongoing_requests=TUNED_IN_FLIGHT) if tuned else Model
    serve.run(model.bind(tuned))
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[-1]), "--tuned" in sys.argv)
