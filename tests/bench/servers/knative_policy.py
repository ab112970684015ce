"""Knative's rules as a policy of Ray Serve, with the largest batch as the concurrency that is aimed at."""

from __future__ import annotations

import time
from typing import Any

import device

from serving.scaling.observed import Seen
from serving.simulator.baselines import Knative


class KnativePolicy:
    """What `AutoscalingPolicy` wants: replicas from a context."""

    def __init__(self) -> None:
        self._knative = Knative(float(device.MAX_ROWS))

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        seen = Seen(ready=int(context.current_num_replicas), in_flight=float(context.total_num_requests))
        wanted = self._knative([seen], [int(context.target_num_replicas)], time.monotonic())
        return max(1, wanted[0]), {}
