"""The Ray cluster inside a RayJob or a RayService: head, worker groups, autoscaler, authentication.

Rules that only the operator enforces are kept here by construction: a Ray version beside token
authentication, version 2 of the autoscaler said out loud, bounds on every group, resources in the
pods' limits and nowhere else. The head takes no work (`num-cpus: 0`): it would be lost with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from k8s.capacity import Group
from k8s.pods import Manifest, Owner, container_security, head_template, worker_template
from k8s.settings import ClusterSettings, Redis


def cluster_spec(owner: Owner, settings: ClusterSettings, groups: Sequence[Group]) -> Manifest:
    """The `rayClusterSpec` (of a RayJob) or `rayClusterConfig` (of a RayService)."""
    autoscales = any(group.low < group.high for group in groups)
    spec: Manifest = {
        "rayVersion": settings.ray_version,
        "authOptions": {"mode": "token", "secretName": settings.auth_secret},
        "enableInTreeAutoscaling": autoscales,
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0"},
            "template": head_template(owner, settings, autoscales=autoscales),
        },
        "workerGroupSpecs": [
            _worker_group(owner, settings, group, autoscales=autoscales) for group in groups
        ],
    }
    if autoscales:
        spec["autoscalerOptions"] = _autoscaler(settings)
    return spec


def redis_options(redis: Redis) -> Manifest:
    """The `gcsFaultToleranceOptions`: the head's state in Redis, its password by reference."""
    options: dict[str, Any] = {"backend": "redis", "redisAddress": redis.address}
    if redis.password:
        reference = {"name": redis.password.name, "key": redis.password.key}
        options["redisPassword"] = {"valueFrom": {"secretKeyRef": reference}}
    return options


def _worker_group(owner: Owner, settings: ClusterSettings, group: Group, *, autoscales: bool) -> Manifest:
    made: Manifest = {
        "groupName": group.name,
        "replicas": group.low,
        "minReplicas": group.low,
        "maxReplicas": group.high,
        "rayStartParams": {},
        "template": worker_template(owner, settings, group),
    }
    if autoscales and group.gpus and settings.gpu_idle_timeout_s is not None:
        made["idleTimeoutSeconds"] = settings.gpu_idle_timeout_s
    return made


def _autoscaler(settings: ClusterSettings) -> Manifest:
    """The sidecar that the operator puts into the head's pod; as hardened as what stands beside it."""
    sizes = {"cpu": "500m", "memory": "512Mi"}
    return {
        "version": "v2",
        "upscalingMode": "Default",
        "idleTimeoutSeconds": settings.idle_timeout_s,
        "imagePullPolicy": "IfNotPresent",
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": {"limits": dict(sizes), "requests": dict(sizes)},
        "securityContext": container_security(),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
