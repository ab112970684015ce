"""A service as a RayService: replicas in worker groups that fit them, the head out of the data path."""

from __future__ import annotations

from cluster.errors import BadInput
from k8s.capacity import Demand, worker_groups
from k8s.grpcdoor import grpc_door
from k8s.guards import disruption_budget, metadata, network_policy, service_account
from k8s.naming import service_name
from k8s.options import Serving
from k8s.pods import Manifest, Owner
from k8s.raycluster import cluster_spec, redis_options
from k8s.serveconfig import serve_config
from k8s.settings import ClusterSettings
from k8s.stores import check_reachable
from k8s.upgrade import upgrade_strategy
from k8s.yamltext import to_yaml
from serving import weights
from serving.ingress import RECOVERY
from serving.ingress import ingress_env as machine_env
from serving.service import Service

_FORGOTTEN_AFTER_S = 10.0
HAPROXY = "/usr/local/bin/tandem-haproxy"
"""Where `pip install` puts it in the image of k8s/image/Dockerfile."""
_WEIGHT_PORTS = 1001
"""Beyond all of the replicas' HTTP ports, 30000 to 31000."""


def ingress_env(drain_s: float, *, haproxy: bool = True, kinds: bool = False) -> dict[str, str]:
    """The environment of Ray's processes in a pod: `serving.ingress` without what a shared machine needs.

    A pod has ports and folders to itself, so these stay as Ray has them and the pods of a group equal.

    Args:
        drain_s: how long a replica that is told to stop has; for the first part of it, until HAProxy on
            every node has seen two health checks fail, it still takes connections.
        haproxy: HAProxy before the replicas, rather than Serve's own proxy.
        kinds: whether a model has two kinds of replica, which HAProxy is to send requests to.
    """
    if not haproxy:
        return machine_env(haproxy=False)
    for_kinds = {
        "RAY_SERVE_HAPROXY_BINARY_PATH": HAPROXY,
        weights.PORTS: str(_WEIGHT_PORTS),
        weights.HOST: "0.0.0.0",  # HAProxies on other nodes ask, too; the NetworkPolicy keeps others out
    }
    return (for_kinds if kinds else {}) | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.lane:middlewares",
        **RECOVERY,
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "30",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": f"{min(_FORGOTTEN_AFTER_S, drain_s / 2):g}",
        "RAY_metrics_report_interval_ms": "2000",
    }


def _has_two_kinds(service: Service, settings: ClusterSettings) -> bool:
    names = [model.ref.model for model in service.models if model.other_replicas is not None]
    if names and not settings.serving.haproxy:
        raise BadInput(
            "two kinds of replica need HAProxy, which spreads requests over both",
            got=f"other_replicas of {', '.join(names)}, and serving.haproxy: false",
            fix="set serving.haproxy to true, or leave other_replicas away",
        )
    return bool(names)


def render_service(service: Service, settings: ClusterSettings) -> list[Manifest]:
    """ServiceAccount, NetworkPolicy, PodDisruptionBudget and RayService, in the order to apply them.

    Raises:
        BadInput: a store on the local disk, an impossible resource, an impossible name, an upgrade that needs
            an autoscaler where nothing scales, two kinds of replica without HAProxy.
    """
    check_reachable({"store": service.store})
    name = service_name(service.name)
    owner = Owner(
        name,
        "serving",
        settings.serving_account.name,
        env=ingress_env(
            service.drain_s, haproxy=settings.serving.haproxy, kinds=_has_two_kinds(service, settings)
        ),
        drain_s=service.drain_s,
        serves=True,
        grpc_port=settings.serving.grpc_port,
    )
    demands = (Demand(r.cpus, r.gpus, r.min, r.max) for r in service.kinds)
    groups = worker_groups(demands, "models.replicas")
    workers_low = sum(group.low for group in groups)
    cluster = cluster_spec(owner, settings, groups)
    if settings.redis:
        cluster["gcsFaultToleranceOptions"] = redis_options(settings.redis)
    return [
        *service_account(settings.serving_account, settings),
        network_policy(owner, settings),
        *disruption_budget(owner, settings, workers_low),
        *grpc_door(service, owner, settings, head_too=workers_low == 0),
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayService",
            "metadata": metadata(name, owner, settings, **_about(service, settings.serving)),
            "spec": {
                "upgradeStrategy": upgrade_strategy(
                    settings.serving, autoscales=cluster["enableInTreeAutoscaling"]
                ),
                "rayClusterDeletionDelaySeconds": settings.serving.old_cluster_s,
                # When everything may scale to zero, only the head is left to take the first request.
                "excludeHeadPodFromServeSvc": workers_low > 0,
                "serveConfigV2": to_yaml(serve_config(service)),
                "rayClusterConfig": cluster,
            },
        },
    ]


def _about(service: Service, serving: Serving) -> dict[str, str]:
    """The annotations of the RayService."""
    found = {"tandem/store": service.store}
    if serving.unready_s is not None:
        found["ray.io/initializing-timeout"] = f"{serving.unready_s}s"
    return found
