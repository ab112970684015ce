"""How many replicas a load needs. Pure; `policy` is what Ray Serve's controller calls.

Serve's own policy counts the requests that go through it, and those that take the short way
(`serving.lane`) don't. So each replica reports its requests in flight (`record_autoscaling_stats`), and the
policy adds those that wait in front of a model with no replica. Bounds, delays and the start from zero are
applied by Serve around it.
"""

from __future__ import annotations

from typing import Any

IN_FLIGHT = "tandem_in_flight"


def replicas_for(in_flight: float, queued: float, target_in_flight: float) -> float:
    """Replicas for a load, before rounding and bounds.

    Args:
        in_flight: requests in all replicas together.
        queued: requests that wait in front of them.
        target_in_flight: requests in flight that one replica should have.
    """
    return (in_flight + queued) / target_in_flight


def policy(context: Any) -> tuple[float, dict[str, Any]]:
    """Ray Serve's autoscaling policy: an `AutoscalingContext` in, replicas wanted and state out."""
    reported = (context.aggregated_metrics or {}).get(IN_FLIGHT, {})
    target = context.config.get_target_ongoing_requests()
    return replicas_for(sum(reported.values()), context.total_queued_requests or 0.0, target), {}
