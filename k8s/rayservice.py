"""A service as a RayService: replicas in worker groups that fit them, the head out of the data path."""

from __future__ import annotations

from k8s.capacity import Demand, worker_groups
from k8s.guards import disruption_budget, metadata, network_policy, service_account
from k8s.naming import service_name
from k8s.pods import Manifest, Owner
from k8s.raycluster import cluster_spec, redis_options
from k8s.serveconfig import serve_config
from k8s.settings import ClusterSettings
from k8s.stores import check_reachable
from k8s.yamltext import to_yaml
from serving.service import Service

# HAProxy in front of the replicas (see serving.app); its ports are free in a pod of its own.
_INGRESS_ENV = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}


def render_service(service: Service, settings: ClusterSettings) -> list[Manifest]:
    """ServiceAccount, NetworkPolicy, PodDisruptionBudget and RayService, in the order to apply them.

    Raises:
        BadInput: a store on the local disk, an impossible resource, an impossible name.
    """
    check_reachable({"store": service.store})
    name = service_name(service.name)
    owner = Owner(
        name,
        "serving",
        settings.serving_account.name,
        env=_INGRESS_ENV,
        drain_s=service.drain_s,
        serves=True,
    )
    replicas = [model.replicas for model in service.models]
    groups = worker_groups((Demand(r.cpus, r.gpus, r.min, r.max) for r in replicas), "models.replicas")
    workers_low = sum(group.low for group in groups)
    cluster = cluster_spec(owner, settings, groups)
    if settings.redis:
        cluster["gcsFaultToleranceOptions"] = redis_options(settings.redis)
    return [
        *service_account(settings.serving_account, settings),
        network_policy(owner, settings),
        *disruption_budget(owner, settings, workers_low),
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayService",
            "metadata": metadata(name, owner, settings, **{"tandem/store": service.store}),
            "spec": {
                "upgradeStrategy": {"type": "NewCluster"},
                # When everything may scale to zero, only the head is left to take the first request.
                "excludeHeadPodFromServeSvc": workers_low > 0,
                "serveConfigV2": to_yaml(serve_config(service)),
                "rayClusterConfig": cluster,
            },
        },
    ]
