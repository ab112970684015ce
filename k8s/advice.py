"""What to do about a plan, where there is something to do: which strategy suits, what will drift."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from k8s.changes import Change, Manifest, cluster_of, strategy_of
from k8s.demand import demand

INCREMENTAL = "NewClusterWithIncrementalUpgrade"


def recommended_strategies(changes: Sequence[Change], after: Mapping[str, Manifest]) -> dict[str, str]:
    """Of each RayService that gets a new cluster, the `upgradeStrategy` that suits.

    GPUs are what nobody has twice: with them step by step, where the autoscaler is on, as it needs. Without
    GPUs a second cluster for some minutes is cheaper than a gateway.
    """
    found = {}
    for name in _rebuilt(changes):
        cluster = cluster_of(after[name])
        steps = _has_gpus(cluster) and bool(cluster.get("enableInTreeAutoscaling"))
        found[name] = INCREMENTAL if steps else "NewCluster"
    return found


def advice(changes: Sequence[Change], after: Mapping[str, Manifest]) -> Iterator[str]:
    """What to do, where there is something to do."""
    rebuilt = _rebuilt(changes)
    for name in rebuilt:
        if _has_gpus(cluster_of(after[name])) and strategy_of(after[name]) == "NewCluster":
            yield (
                f"{name}: GPUs are doubled while both clusters run; NewClusterWithIncrementalUpgrade moves"
                " traffic step by step with a surge you choose (it needs a Gateway and the autoscaler)"
            )
        if any(c.object == name and c.path == "spec.serveConfigV2" for c in changes):
            yield (
                f"{name}: what is served changes with the cluster;"
                " applied one after the other, a fault is easier to place"
            )
    waiting = sorted({change.object for change in changes if change.effect == "waits"} - set(rebuilt))
    for name in waiting:
        if name.startswith("RayService/"):
            yield (
                f"{name}: the running cluster will differ from what is written; change its RayCluster as"
                " well, or add what makes a new cluster, such as an annotation in a pod's template"
            )


def _rebuilt(changes: Sequence[Change]) -> list[str]:
    """RayServices that get a new cluster."""
    found = {change.object for change in changes if change.effect == "new cluster"}
    return sorted(name for name in found if name.startswith("RayService/"))


def _has_gpus(cluster: Mapping[str, Any]) -> bool:
    return any(demand(group).gpus for group in cluster.get("workerGroupSpecs") or [])
