"""The operator's rules about a Ray cluster, its groups, its autoscaler, its state and its token."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from k8s.lint.finding import Finding
from k8s.lint.gated import gated_rules

Tree = Mapping[str, Any]
_RESOURCE_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
_AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
_TRUE = ("1", "true")
_REDIS_ENV = ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS")


def cluster_rules(spec: Tree, where: str, owner: Tree, *, standalone: bool) -> Iterator[Finding]:
    """What the operator would refuse in a cluster.

    Args:
        spec: of the cluster.
        where: its path.
        owner: the whole object that it stands in.
        standalone: whether that is a RayCluster.
    """
    head, groups = spec.get("headGroupSpec") or {}, spec.get("workerGroupSpecs") or []
    autoscales = bool(spec.get("enableInTreeAutoscaling"))
    yield from _group(head, f"{where}.headGroupSpec")
    version_2 = (spec.get("autoscalerOptions") or {}).get("version") == "v2" or _env(head).get(
        _AUTOSCALER_V2
    ) in _TRUE
    for number, group in enumerate(groups):
        place = f"{where}.workerGroupSpecs[{number}]"
        yield from _group(group, place)
        yield from _bounds(group, place)
        yield from _autoscaled(group, place, spec, version_2=version_2, autoscales=autoscales)
    if _env(head).get(_AUTOSCALER_V2) in _TRUE and not autoscales:
        yield Finding(
            f"{where}.enableInTreeAutoscaling",
            f"{_AUTOSCALER_V2} stands in the head's environment, and there is no autoscaler",
            "false",
            "true, or the variable left out",
            "set enableInTreeAutoscaling",
        )
    options = spec.get("autoscalerOptions") or {}
    if any(one.get("name") == "KUBERAY_GEN_AUTOSCALER_START_CMD" for one in options.get("env") or []):
        yield Finding(
            f"{where}.autoscalerOptions.env",
            "the operator sets this variable",
            "KUBERAY_GEN_AUTOSCALER_START_CMD",
            "any other",
            "leave it out",
        )
    yield from gated_rules(spec, where)
    yield from _gcs(spec, head, where, owner)
    yield from _auth(spec, where, standalone=standalone)
    if not standalone and spec.get("upgradeStrategy"):
        yield Finding(
            f"{where}.upgradeStrategy",
            "a cluster that belongs to a RayService or RayJob is upgraded by its owner",
            str(spec["upgradeStrategy"]),
            "nothing here",
            "say spec.upgradeStrategy of the RayService instead",
        )


def _group(group: Tree, where: str) -> Iterator[Finding]:
    """A head or a worker group."""
    containers = ((group.get("template") or {}).get("spec") or {}).get("containers") or []
    if not containers:
        yield Finding(
            f"{where}.template.spec.containers", "no container", "none", "Ray's container first", "add it"
        )
    params = group.get("rayStartParams") or {}
    twice = [name for name in _RESOURCE_PARAMS if name in params]
    if group.get("resources") and twice:
        yield Finding(
            f"{where}.resources",
            "resources are said twice",
            f"resources, and rayStartParams {', '.join(twice)}",
            "one of the two",
            "leave them out of rayStartParams",
        )
    if "labels" in params:
        yield Finding(
            f"{where}.rayStartParams.labels",
            "labels of nodes have a field of their own",
            str(params["labels"]),
            "nothing here",
            "move them to the group's labels",
        )


def _bounds(group: Tree, where: str) -> Iterator[Finding]:
    low, high = group.get("minReplicas"), group.get("maxReplicas")
    for field in ("replicas", "minReplicas", "maxReplicas"):
        value = group.get(field)
        if isinstance(value, int) and value < 0:
            yield Finding(
                f"{where}.{field}", "a negative number of pods", str(value), "0 or more", "raise it"
            )
    if isinstance(low, int) and isinstance(high, int) and low > high:
        yield Finding(
            f"{where}.minReplicas", "more pods at least than at most", str(low), f"at most {high}", "lower it"
        )


def _autoscaled(
    group: Tree, where: str, spec: Tree, *, version_2: bool, autoscales: bool
) -> Iterator[Finding]:
    for field in ("idleTimeoutSeconds", "priority"):
        if group.get(field) and not version_2:
            yield Finding(
                f"{where}.{field}",
                "only version 2 of the autoscaler reads this",
                str(group[field]),
                "autoscalerOptions.version: v2, said out loud",
                "say it, or leave this out",
            )
    if group.get("priority") and _version(spec.get("rayVersion")) < (2, 56):
        yield Finding(
            f"{where}.priority",
            "this Ray has no priorities",
            str(spec.get("rayVersion")),
            "2.56 or later",
            "raise it",
        )
    if group.get("suspend") and autoscales:
        yield Finding(
            f"{where}.suspend",
            "the autoscaler would start what is suspended",
            "true",
            "false",
            "leave it out",
        )


def _gcs(spec: Tree, head: Tree, where: str, owner: Tree) -> Iterator[Finding]:
    """Where the head keeps its state."""
    options, env = spec.get("gcsFaultToleranceOptions"), _env(head)
    annotations = (owner.get("metadata") or {}).get("annotations") or {}
    if options is None:
        if "RAY_REDIS_ADDRESS" in env:
            yield Finding(
                f"{where}.gcsFaultToleranceOptions",
                "Redis is named in the head's environment alone",
                "RAY_REDIS_ADDRESS",
                "gcsFaultToleranceOptions.redisAddress",
                "move it there",
            )
        return
    said = [name for name in _REDIS_ENV if name in env]
    said += [
        f"rayStartParams {name}" for name in ("redis-password",) if name in (head.get("rayStartParams") or {})
    ]
    said += [
        f"annotation {name}"
        for name in ("ray.io/ft-enabled", "ray.io/external-storage-namespace")
        if name in annotations
    ]
    for one in said:
        yield Finding(
            f"{where}.gcsFaultToleranceOptions",
            "where the head keeps its state is said twice",
            one,
            "gcsFaultToleranceOptions alone",
            f"leave out {one}",
        )
    rocks, redis = options.get("backend") == "rocksdb", [key for key in options if key.startswith("redis")]
    if rocks and redis:
        yield Finding(
            f"{where}.gcsFaultToleranceOptions",
            "two backends",
            ", ".join(redis),
            "one",
            "leave Redis' fields out",
        )
    storage = options.get("storage") or {}
    made = [key for key in ("size", "storageClassName", "accessModes") if key in storage]
    if made and "claimName" in storage:
        yield Finding(
            f"{where}.gcsFaultToleranceOptions.storage",
            "a claim that exists has these already",
            ", ".join(made),
            "claimName alone",
            "leave one of the two out",
        )
    if options.get("storage") and not rocks:
        yield Finding(
            f"{where}.gcsFaultToleranceOptions.storage",
            "only rocksdb has storage",
            "storage",
            "nothing",
            "leave it out",
        )


def _auth(spec: Tree, where: str, *, standalone: bool) -> Iterator[Finding]:
    auth = spec.get("authOptions") or {}
    version = spec.get("rayVersion")
    if auth.get("mode") == "token" and _version(version) < (2, 52):
        yield Finding(
            f"{where}.rayVersion",
            "this Ray can't ask for a token",
            str(version),
            "2.52 or later",
            "say the version",
        )
    if auth.get("enableK8sTokenAuth"):
        bad = [
            text
            for wrong, text in (
                (auth.get("mode") != "token", "mode is not token"),
                (_version(version) < (2, 55), f"Ray {version} is older than 2.55"),
                ("secretName" in auth, "a secretName besides"),
                (not standalone, "not a RayCluster of its own"),
            )
            if wrong
        ]
        for text in bad:
            yield Finding(
                f"{where}.authOptions.enableK8sTokenAuth",
                "Kubernetes' tokens can't be used here",
                text,
                "a RayCluster with mode token, Ray 2.55 or later, no secretName",
                "leave it out",
            )


def _env(group: Tree) -> dict[str, Any]:
    """The environment of the group's Ray container."""
    containers = ((group.get("template") or {}).get("spec") or {}).get("containers") or []
    return (
        {one.get("name"): one.get("value") for one in (containers[0].get("env") or [])} if containers else {}
    )


def _version(text: Any) -> tuple[int, ...]:
    """(2, 60, 0) of "2.60.0"; () where there is none."""
    found = re.match(r"\d+(\.\d+)*", str(text or ""))
    return tuple(int(part) for part in found.group().split(".")) if found else ()
