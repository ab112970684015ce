"""The policy as Ray Serve's controller calls it: ten times a second, in the loop that runs everything.

So it must never raise (Serve would stop deciding for this application and those after it), never block, and
be cheap: it decides anew twice a second, and says the same in between. Facts of Ray 2.60 that it rests on:

- A class named in `AutoscalingPolicy` is made once in the controller and called with an `AutoscalingContext`;
  it gives replicas and a state. Our state stays in the object: Serve copies its own at every call.
- Serve applies bounds, factors and delays around a policy; `serving.app` sets the delays to 0.
- With no replica and a request held, Serve doesn't ask: it starts one. So that start is learned from the
  time that Serve says it scaled up.
- The last step to zero is taken from one replica only.
"""

from __future__ import annotations

import logging
from typing import Any

from cluster.clock import SYSTEM_CLOCK, Clock
from serving.scaling.observed import together
from serving.scaling.policy import Settings, State, decide
from serving.scaling.report import read

logger = logging.getLogger("tandem.serving")

PATH = "serving.scaling.on_serve:TargetPolicy"
"""What `AutoscalingPolicy(policy_function=...)` is given; the keywords are `Settings`' own."""
_EVERY_S = 0.5


class TargetPolicy:
    """Replicas for one deployment.

    Args:
        options: fields of `serving.scaling.policy.Settings`.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK, **options: Any) -> None:
        self._settings = Settings(**options)
        self._clock = clock
        self._state = State()
        self._decided_s: float | None = None
        self._wanted = 0
        self._failed = False

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Replicas wanted, and no state."""
        try:
            return self._decide(context), {}
        except Exception:
            if not self._failed:
                self._failed = True
                logger.exception("the scaling policy failed; the number of replicas stays (told once)")
            return int(context.target_num_replicas), {}

    def _decide(self, context: Any) -> int:
        now_s, target = self._clock.monotonic_s(), int(context.target_num_replicas)
        if self._decided_s is not None and now_s - self._decided_s < _EVERY_S:
            return self._wanted
        ready = int(context.current_num_replicas)
        loads = read(context.raw_metrics, float(context.current_time))
        held = float(context.total_queued_requests or 0.0)
        self._decided_s, self._wanted = now_s, target
        if ready > 0 and not loads:
            return target  # nothing is known of what they do, so nothing is changed
        self._learn_of_starts(context, ready, now_s)
        seen = together(loads, ready=ready, starting=max(0, target - ready), held=held)
        decision = decide(self._settings, self._state, seen, target, now_s)
        self._state, self._wanted = decision.state, decision.wanted
        return self._wanted

    def _learn_of_starts(self, context: Any, ready: int, now_s: float) -> None:
        """A start from zero, which Serve decided without us."""
        if self._state.starts.ready == 0 < ready and context.last_scale_up_time is not None:
            ago_s = float(context.current_time) - float(context.last_scale_up_time)
            self._state = self._state.asked_for_at(now_s - ago_s)
