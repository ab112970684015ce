"""Who reaches whom under the overlays' NetworkPolicies: all that is needed, and nothing else."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import yaml
from golden_k8s import GOLDEN
from network_policies import End, allowed

Tree = dict[str, Any]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@functools.cache
def policies(overlay: str) -> list[Tree]:
    objects = yaml.load_all((GOLDEN / f"{overlay}.yaml").read_text(), _LOADER)
    return [one for one in objects if one["kind"] == "NetworkPolicy"]


def pod(component: str, role: str, name: str | None = None, namespace: str = "tandem") -> End:
    job = next(
        one["metadata"]["name"]
        for one in policies("prod-ha")
        if one["spec"]["podSelector"].get("matchLabels", {}).get("tandem/component") == "training"
        and "tandem/name" in one["spec"]["podSelector"]["matchLabels"]
    )
    names = {"training": job, "serving": "vision"}
    labels = {
        "tandem/name": name or names[component],
        "tandem/component": component,
        "tandem/role": role,
    }
    return End(labels, namespace)


HEAD, WORKER = pod("serving", "head"), pod("serving", "worker")
TRAINER, DRIVER = pod("training", "worker"), pod("training", "head")
SUBMITTER, LAUNCHER = pod("training", "submitter"), pod("training", "launcher")
OTHER = pod("serving", "head", name="another")
REDIS = End({"app.kubernetes.io/name": "redis"})
DNS = End({"k8s-app": "kube-dns"}, "kube-system")
OPERATOR = End({"app.kubernetes.io/component": "kuberay-operator"}, "kuberay")
PROMETHEUS = End({"app.kubernetes.io/name": "prometheus"}, "monitoring")
STRANGER = End({"app": "x"})
CLIENT = End({"app": "frontend"}, "shop")
STORAGE, API_SERVER = End(ip="52.219.0.10"), End(ip="10.0.0.1")
METADATA = End(ip="169.254.169.254")

NEEDED = {
    "raylets talk on ports by chance": (WORKER, HEAD, 38211),
    "workers find the head's state": (WORKER, HEAD, 6379),
    "the head reaches workers": (HEAD, WORKER, 45107),
    "training workers among themselves": (TRAINER, pod("training", "worker"), 29500),
    "the driver's head reaches its workers": (DRIVER, TRAINER, 41000),
    "the submitter hands in its job": (SUBMITTER, DRIVER, 8265),
    "the head keeps its state in Redis": (HEAD, REDIS, 6379),
    "the operator asks the dashboard": (OPERATOR, HEAD, 8265),
    "the operator asks after Serve": (OPERATOR, WORKER, 8000),
    "requests come in": (CLIENT, WORKER, 8000),
    "Prometheus asks each pod": (PROMETHEUS, WORKER, 8080),
    "Prometheus asks training": (PROMETHEUS, TRAINER, 8080),
    "models are loaded": (WORKER, STORAGE, 443),
    "checkpoints are written": (TRAINER, STORAGE, 443),
    "the autoscaler asks the API server": (HEAD, API_SERVER, 6443),
    "a launcher asks the API server": (LAUNCHER, API_SERVER, 443),
    "names by TCP": (WORKER, DNS, 53),
}
REFUSED = {
    "code through the dashboard": (CLIENT, HEAD, 8265),
    "code from a pod of the namespace": (STRANGER, HEAD, 8265),
    "Ray's client port": (CLIENT, HEAD, 10001),
    "the head's state": (CLIENT, HEAD, 6379),
    "another service's head": (OTHER, HEAD, 6379),
    "training asks serving's head": (TRAINER, HEAD, 8265),
    "serving asks training's head": (WORKER, DRIVER, 8265),
    "metrics by anybody": (CLIENT, WORKER, 8080),
    "Prometheus at the dashboard": (PROMETHEUS, HEAD, 8265),
    "requests at a training pod": (CLIENT, TRAINER, 8000),
    "workers at Redis": (WORKER, REDIS, 6379),
    "anybody at Redis": (STRANGER, REDIS, 6379),
    "the node's identity": (WORKER, METADATA, 80),
    "a worker at another port outside": (WORKER, STORAGE, 22),
    "a worker at the API server's own port": (WORKER, API_SERVER, 6443),
    "a stranger of the namespace outside": (STRANGER, STORAGE, 443),
    "the submitter outside": (SUBMITTER, STORAGE, 443),
}


@pytest.mark.parametrize("case", NEEDED)
def test_what_is_needed_is_let_through(case: str) -> None:
    assert allowed(policies("prod-ha"), *NEEDED[case])


@pytest.mark.parametrize("case", REFUSED)
def test_all_else_is_refused(case: str) -> None:
    assert not allowed(policies("prod-ha"), *REFUSED[case])


def test_names_by_udp_for_every_pod() -> None:
    for client in (HEAD, WORKER, TRAINER, SUBMITTER, STRANGER):
        assert allowed(policies("prod-ha"), client, DNS, 53, "UDP")


def test_object_storage_inside_the_namespace() -> None:
    minio = End({"app.kubernetes.io/name": "minio"}, "tandem-dev")
    worker = pod("training", "worker", namespace="tandem-dev")
    assert allowed(policies("dev-cpu"), worker, minio, 9000)
    assert not allowed(policies("dev-cpu"), End({"app": "x"}, "tandem-dev"), minio, 9000)


@pytest.mark.parametrize("overlay", ["dev-cpu", "staging", "prod-gpu", "prod-ha"])
def test_every_overlay_denies_by_default(overlay: str) -> None:
    (deny,) = [one for one in policies(overlay) if one["metadata"]["name"] == "default-deny"]
    assert deny["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
