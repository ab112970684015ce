"""What only several objects together show: replicas that no pod holds, pods beyond a quota, drains cut off.

Reads `serveConfigV2` as Tandem writes it, and ResourceQuotas that stand among the manifests. Where a Serve
application isn't Tandem's, its deployments' own options are read as far as they are said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from k8s.demand import Demand, cpu, demand
from k8s.lint.finding import Finding

Tree = Mapping[str, Any]

_QUOTA_CPUS = ("limits.cpu", "requests.cpu", "cpu")
_ZERO = Demand(0.0, 0.0)


def across(manifests: Sequence[Tree]) -> Iterator[Finding]:
    """What doesn't fit together."""
    for manifest in manifests:
        kind, name = str(manifest.get("kind")), (manifest.get("metadata") or {}).get("name")
        where, spec = f"{kind}/{name}.spec", manifest.get("spec") or {}
        if kind == "RayService":
            yield from _served(spec, where)
    yield from _quotas(manifests)


def _served(spec: Tree, where: str) -> Iterator[Finding]:
    cluster = spec.get("rayClusterConfig") or {}
    groups = cluster.get("workerGroupSpecs") or []
    place = f"{where}.serveConfigV2"
    try:
        config = yaml.safe_load(spec.get("serveConfigV2") or "") or {}
    except yaml.YAMLError as error:
        yield Finding(
            place, "it isn't YAML", str(error).split("\n")[0], "what Serve's schema says", "render it again"
        )
        return
    served = [model for application in config.get("applications") or [] for model in _models(application)]
    most = sum((_most(group) for group in groups), _ZERO)
    wanted = sum((Demand(cpus, gpus) * replicas for _, cpus, gpus, replicas in served), _ZERO)
    for what, has, asks in (("GPUs", most.gpus, wanted.gpus), ("CPUs", most.cpus, wanted.cpus)):
        if asks > has + 1e-9:
            yield Finding(
                f"{where}.rayClusterConfig.workerGroupSpecs",
                f"all replicas together ask for more {what} than all pods have",
                f"{asks:g} by {', '.join(name for name, *_ in served)}",
                f"at most {has:g}",
                "raise maxReplicas of a group, or lower the replicas' max",
            )
    drain_s = max((_drain_s(application) for application in config.get("applications") or []), default=0.0)
    for number, group in enumerate(groups):
        grace_s = float(
            ((group.get("template") or {}).get("spec") or {}).get("terminationGracePeriodSeconds", 30)
        )
        if grace_s < drain_s:
            yield Finding(
                f"{where}.rayClusterConfig.workerGroupSpecs[{number}].template.spec.terminationGracePeriodSeconds",
                "a pod is killed while its replicas still drain",
                f"{grace_s:g} s",
                f"at least drain_s, {drain_s:g} s",
                "raise it, or lower drain_s",
            )
    yield from _limits(config, place)


def _limits(config: Tree, where: str) -> Iterator[Finding]:
    """What one model's own numbers say of each other, where they were edited by hand."""
    for application in config.get("applications") or []:
        service = (application.get("args") or {}).get("service") or {}
        for model in service.get("models") or []:
            name, batch, queue = (
                model.get("model"),
                model.get("max_batch_size", 1),
                model.get("max_queue_rows"),
            )
            if queue is not None and batch > queue:
                yield Finding(
                    where,
                    f"{name}: a full batch never forms",
                    f"max_batch_size {batch}",
                    f"{queue}",
                    "lower it",
                )
            if float(model.get("slo_ms", 0)) / 1000 > float(service.get("drain_s", 20)):
                yield Finding(
                    where,
                    f"{name}: what is accepted may be cut off by a drain",
                    f"slo_ms {model['slo_ms']:g}",
                    f"at most drain_s, {service.get('drain_s', 20):g} s",
                    "raise drain_s",
                )


def _models(application: Tree) -> Iterator[tuple[str, float, float, int]]:
    """Name, CPUs, GPUs and the largest number of replicas of what an application runs."""
    args = application.get("args") or {}
    service, only = args.get("service") or {}, args.get("model")
    pool = service.get("pool") if only is None else None
    if pool:
        yield ("the pool", *_numbers(pool.get("replicas") or {}))
    for model in () if pool else service.get("models") or []:
        name = str(model.get("model", ""))
        if only is None and len(service["models"]) > 1:
            return  # the front of several: each of them is an application of its own
        if only is None or name.partition("@")[0] == only:
            kind = "other_replicas" if args.get("other") else "replicas"
            yield (name, *_numbers(model.get(kind) or {}))
    for deployment in application.get("deployments") or []:
        actor, scaling = deployment.get("ray_actor_options") or {}, deployment.get("autoscaling_config") or {}
        replicas = scaling.get("max_replicas", deployment.get("num_replicas", 1))
        if isinstance(replicas, int):
            yield (
                str(deployment.get("name")),
                float(actor.get("num_cpus", 1)),
                float(actor.get("num_gpus", 0)),
                replicas,
            )


def _numbers(replicas: Tree) -> tuple[float, float, int]:
    return float(replicas.get("cpus", 1)), float(replicas.get("gpus", 0)), int(replicas.get("max", 1))


def _drain_s(application: Tree) -> float:
    service = (application.get("args") or {}).get("service") or {}
    own = [float(one.get("graceful_shutdown_timeout_s", 0)) for one in application.get("deployments") or []]
    return max([float(service.get("drain_s", 0)), *own])


def _most(group: Tree) -> Demand:
    return demand(group) * int(group.get("maxReplicas") or group.get("replicas") or 0)


def _quotas(manifests: Sequence[Tree]) -> Iterator[Finding]:
    quotas = [one for one in manifests if one.get("kind") == "ResourceQuota"]
    for quota in quotas:
        namespace = (quota.get("metadata") or {}).get("namespace")
        hard = (quota.get("spec") or {}).get("hard") or {}
        asked = sum((_peak(one) for one in manifests if _in(one, namespace)), _ZERO)
        cpus = [cpu(hard[key]) for key in _QUOTA_CPUS if key in hard]
        gpus = [float(value) for key, value in hard.items() if str(key).endswith("gpu")]
        for what, asks, limits in (("CPUs", asked.cpus, cpus), ("GPUs", asked.gpus, gpus)):
            if limits and asks > min(limits) + 1e-9:
                yield Finding(
                    f"ResourceQuota/{(quota.get('metadata') or {}).get('name')}.spec.hard",
                    f"all clusters at their largest ask for more {what} than the quota gives",
                    f"{asks:g}",
                    f"{min(limits):g}",
                    "raise the quota, or lower maxReplicas",
                )


def _in(manifest: Tree, namespace: str | None) -> bool:
    return (manifest.get("metadata") or {}).get("namespace") == namespace


def _peak(manifest: Tree) -> Demand:
    spec = manifest.get("spec") or {}
    if manifest.get("kind") == "RayCronJob":
        spec = spec.get("jobTemplate") or {}
    cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec")
    if manifest.get("kind") == "RayCluster":
        cluster = spec
    if not cluster:
        return _ZERO
    head = demand(cluster.get("headGroupSpec") or {})
    return sum((_most(group) for group in cluster.get("workerGroupSpecs") or []), head)
