"""Ray Serve with its own autoscaling, or with Knative's rules: the sleeping device, or the zero-cost model.

Run as `python serve_scaling.py device|zero serve|knative MOST PORT`, with Serve's settings for HAProxy in the
environment. `device` is the plain FIFO batcher of `serve_device`; `zero` the ONNX graph at `$BENCH_MODEL`,
from no replica on.
"""

from __future__ import annotations

import signal
import sys
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from serve_device import IN_FLIGHT, Fifo
from starlette.requests import Request

IDLE_S = 2.0
CPUS = 0.1


@serve.deployment(max_ongoing_requests=IN_FLIGHT)
class Scores:
    """POST / {"features": [64 numbers]} gives {"scores": [10 numbers]}."""

    def __init__(self) -> None:
        from mlp import Mlp

        self._model = Mlp()

    async def __call__(self, request: Request) -> dict[str, list[float]]:
        import numpy as np

        body = await request.json()
        scores: list[float] = self._model(np.asarray([body["features"]], np.float32))[0].tolist()
        return {"scores": scores}


def scaling(kind: str, how: str, most: int) -> AutoscalingConfig:
    """Serve's defaults, but for the bounds; Knative's rules; or to zero as soon as Serve can be told to."""
    if kind == "zero":
        return AutoscalingConfig(
            min_replicas=0,
            max_replicas=most,
            metrics_interval_s=0.5,
            look_back_period_s=IDLE_S,
            downscale_delay_s=IDLE_S,
            downscale_to_zero_delay_s=IDLE_S,
        )
    if how == "serve":
        return AutoscalingConfig(min_replicas=1, max_replicas=most)
    return AutoscalingConfig(
        min_replicas=1,
        max_replicas=most,
        metrics_interval_s=0.5,
        look_back_period_s=2.5,
        upscale_delay_s=0,
        downscale_delay_s=0,
        policy=AutoscalingPolicy(policy_function="knative_policy:KnativePolicy"),
    )


def main(kind: str, how: str, most: int, port: int) -> None:
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    chosen: Any = Fifo if kind == "device" else Scores
    options = {"autoscaling_config": scaling(kind, how, most), "ray_actor_options": {"num_cpus": CPUS}}
    serve.run(chosen.options(**options).bind())
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
