"""How a service moves from one cluster to the next: the RayService's `upgradeStrategy`.

A new cluster at once is the operator's default: simple, and everything is doubled meanwhile. Step by step
needs the Gateway API and, by the operator's rule, an autoscaler; it moves traffic on a timer and on
readiness, and looks at no latency. `k8s.plan` says which of them a given change calls for.
"""

from __future__ import annotations

from typing import Any

from cluster.errors import BadInput
from k8s.options import Serving


def upgrade_strategy(serving: Serving, *, autoscales: bool) -> dict[str, Any]:
    """The strategy that the settings ask for, or allow.

    Args:
        serving: with `upgrade` None, step by step is chosen where there is a gateway and something scales.
        autoscales: whether the service's cluster does.

    Raises:
        BadInput: step by step was asked for, and nothing scales.
    """
    if serving.upgrade == "none":
        return {"type": "None"}
    if serving.upgrade == "incremental" and not autoscales:
        raise BadInput(
            "'serving.upgrade: incremental' can't be done for this service",
            got="replicas.min equal to replicas.max in every model: nothing scales",
            allowed="a model whose number of replicas may change",
            fix="raise a model's replicas.max, or say upgrade: new-cluster",
        )
    gateway = serving.gateway
    if gateway is None or not autoscales:
        return {"type": "NewCluster"}
    return {
        "type": "NewClusterWithIncrementalUpgrade",
        "clusterUpgradeOptions": {
            "gatewayClassName": gateway.gateway_class,
            "stepSizePercent": gateway.step_percent,
            "intervalSeconds": gateway.interval_s,
            "maxSurgePercent": gateway.surge_percent,
        },
    }
