"""The policy for two kinds as Ray Serve's controller calls it, by the rules of `serving.scaling.on_serve`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from cluster.clock import SYSTEM_CLOCK, Clock
from serving.scaling.kinds import Terms
from serving.scaling.kinds_table import Look, table_of
from serving.scaling.observed import together
from serving.scaling.policy import Settings
from serving.scaling.report import read

logger = logging.getLogger("tandem.serving")

PATH = "serving.scaling.kinds_on_serve:KindPolicy"


class KindPolicy:
    """Replicas for one of two kinds.

    Args:
        group: the name that both kinds have in common.
        kind: 0 or 1.
        terms: least, most and price of each kind.
        options: fields of `serving.scaling.policy.Settings`.
    """

    def __init__(
        self,
        group: str,
        kind: int,
        terms: Sequence[Sequence[float]],
        clock: Clock = SYSTEM_CLOCK,
        **options: Any,
    ) -> None:
        self._table = table_of(group)
        self._kind = kind
        self._terms = tuple(Terms(int(least), int(most), price) for least, most, price in terms)
        self._settings = Settings(**options)
        self._clock = clock
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
        return self._table.decide(
            self._settings, self._terms, self._kind, _look(context, self._clock.monotonic_s())
        )


def _look(context: Any, now_s: float) -> Look:
    ready, target = int(context.current_num_replicas), int(context.target_num_replicas)
    loads = read(context.raw_metrics, float(context.current_time))
    held = float(context.total_queued_requests or 0.0)
    known = ready == 0 or loads
    seen = together(loads, ready=ready, starting=max(0, target - ready), held=held) if known else None
    up_s = context.last_scale_up_time
    ago_s = float(context.current_time) - float(up_s) if up_s is not None else None
    return Look(now_s, target, seen, now_s - ago_s if ago_s is not None else None)
