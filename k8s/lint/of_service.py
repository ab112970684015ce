"""The operator's rules about a RayService."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from k8s.lint.finding import Finding
from k8s.lint.of_cluster import cluster_rules

Tree = Mapping[str, Any]

_DURATION = re.compile(r"([0-9]+(\.[0-9]+)?(ns|us|µs|ms|s|m|h))+|[0-9]+")


def service_rules(spec: Tree, where: str, manifest: Tree) -> Iterator[Finding]:
    """What the operator would refuse in the spec of a RayService at `where`."""
    cluster = spec.get("rayClusterConfig") or {}
    yield from cluster_rules(cluster, f"{where}.rayClusterConfig", manifest, standalone=False)
    head_service = ((cluster.get("headGroupSpec") or {}).get("headService") or {}).get("metadata") or {}
    if head_service.get("name"):
        yield Finding(
            f"{where}.rayClusterConfig.headGroupSpec.headService.metadata.name",
            "two clusters of one service would share the name",
            str(head_service["name"]),
            "nothing",
            "leave it out",
        )
    strategy = spec.get("upgradeStrategy") or {}
    kinds = ("NewCluster", "NewClusterWithIncrementalUpgrade", "None")
    if strategy.get("type") not in (None, *kinds):
        yield Finding(
            f"{where}.upgradeStrategy.type",
            "no such strategy",
            str(strategy["type"]),
            ", ".join(kinds),
            "choose one",
        )
    if strategy.get("type") == "NewClusterWithIncrementalUpgrade":
        yield from _incremental(strategy.get("clusterUpgradeOptions") or {}, cluster, where)
    timeout = ((manifest.get("metadata") or {}).get("annotations") or {}).get("ray.io/initializing-timeout")
    if timeout is not None and not _positive_duration(str(timeout)):
        yield Finding(
            f"RayService/{(manifest.get('metadata') or {}).get('name')}.metadata.annotations",
            "ray.io/initializing-timeout is no duration",
            repr(timeout),
            "such as 10m, or a number of seconds above 0",
            "note that a service which misses it must be deleted and made anew",
        )


def _incremental(options: Tree, cluster: Tree, where: str) -> Iterator[Finding]:
    place = f"{where}.upgradeStrategy.clusterUpgradeOptions"
    if not cluster.get("enableInTreeAutoscaling"):
        yield Finding(
            f"{where}.rayClusterConfig.enableInTreeAutoscaling",
            "an incremental upgrade scales both clusters",
            "false",
            "true",
            "switch the autoscaler on",
        )
    surge, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent")
    if not (isinstance(step, int) and isinstance(surge, int) and 0 <= step <= surge <= 100):
        yield Finding(
            f"{place}.stepSizePercent",
            "steps and surge don't fit",
            f"step {step}, surge {surge}",
            "0 <= stepSizePercent <= maxSurgePercent <= 100",
            "change one of them",
        )
    if not (isinstance(options.get("intervalSeconds"), int) and options["intervalSeconds"] > 0):
        yield Finding(
            f"{place}.intervalSeconds",
            "no time between steps",
            str(options.get("intervalSeconds")),
            "above 0",
            "say it",
        )
    if not options.get("gatewayClassName"):
        yield Finding(
            f"{place}.gatewayClassName", "no gateway to move traffic", "nothing", "a GatewayClass", "name it"
        )


def _positive_duration(text: str) -> bool:
    return bool(_DURATION.fullmatch(text)) and any(digit in "123456789" for digit in text)
