"""What stands around a cluster: its service account, who may reach it, how much of it may be evicted."""

from __future__ import annotations

from typing import Any

from k8s.naming import COMPONENT_LABEL, NAME_LABEL, ROLE_LABEL, object_labels
from k8s.pods import DASHBOARD_PORT, HAPROXY_METRICS_PORT, METRICS_PORT, SERVE_PORT, Manifest, Owner
from k8s.settings import ClusterSettings, ServiceAccount

_OPERATOR = {"app.kubernetes.io/component": "kuberay-operator"}
_NAMESPACE_LABEL = "kubernetes.io/metadata.name"


def metadata(name: str, owner: Owner, settings: ClusterSettings, **annotations: str) -> Manifest:
    """An object's metadata."""
    found: Manifest = {
        "name": name,
        "namespace": settings.namespace,
        "labels": object_labels(owner.name, owner.component),
    }
    return found | ({"annotations": annotations} if annotations else {})


def service_account(account: ServiceAccount, settings: ClusterSettings) -> list[Manifest]:
    """The account, where it is ours to create. It carries no token of its own accord."""
    if not account.create:
        return []
    found: dict[str, Any] = {"name": account.name, "namespace": settings.namespace}
    if account.annotations:
        found["annotations"] = dict(account.annotations)
    return [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": found,
            "automountServiceAccountToken": False,
        }
    ]


def network_policy(owner: Owner, settings: ClusterSettings) -> Manifest:
    """Nobody gets in but the cluster's own pods, the operator, and, where it serves, requests.

    Who reaches the dashboard can run code, and who reaches the head's other ports can do worse: the
    token is one lock, this is the other. Traffic out is left alone: stores, DNS and the API server
    stand at addresses that only the cluster's owner knows.
    """
    rules: list[Manifest] = [
        {"from": [{"podSelector": {"matchLabels": {NAME_LABEL: owner.name}}}]},
        {
            "from": [_from_namespace(settings.operator_namespace, _OPERATOR)],
            "ports": _tcp(DASHBOARD_PORT, SERVE_PORT),
        },
    ]
    if owner.serves:
        rules.append({"ports": _tcp(SERVE_PORT, *([owner.grpc_port] if owner.grpc_port else []))})
    if settings.monitoring_namespace:
        ports = _tcp(METRICS_PORT, HAPROXY_METRICS_PORT) if owner.serves else _tcp(METRICS_PORT)
        rules.append({"from": [_from_namespace(settings.monitoring_namespace, None)], "ports": ports})
    selector = {NAME_LABEL: owner.name, COMPONENT_LABEL: owner.component}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(owner.name, owner, settings),
        "spec": {"podSelector": {"matchLabels": selector}, "policyTypes": ["Ingress"], "ingress": rules},
    }


def disruption_budget(owner: Owner, settings: ClusterSettings, workers_low: int) -> list[Manifest]:
    """Of the workers that always run, all but one stay when nodes are drained.

    Nothing where there is at most one: a budget would then keep its node from ever being drained. The
    number is absolute because a RayCluster has no scale to take a percentage of.
    """
    if workers_low < 2:
        return []
    selector = {NAME_LABEL: owner.name, COMPONENT_LABEL: owner.component, ROLE_LABEL: "worker"}
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": metadata(owner.name, owner, settings),
            "spec": {"minAvailable": workers_low - 1, "selector": {"matchLabels": selector}},
        }
    ]


def _from_namespace(namespace: str | None, pods: dict[str, str] | None) -> Manifest:
    spaces = {"matchLabels": {_NAMESPACE_LABEL: namespace}} if namespace else {}
    return {"namespaceSelector": spaces} | ({"podSelector": {"matchLabels": pods}} if pods else {})


def _tcp(*ports: int) -> list[Manifest]:
    return [{"protocol": "TCP", "port": port} for port in ports]
