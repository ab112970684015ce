"""The admission policies admit what Tandem renders, and refuse what each was written against."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from admission import PLURALS, refusals
from golden_k8s import GOLDEN
from kuberay_crds import EXAMPLES

from cluster.config import load_yaml
from k8s.render import render
from k8s.settings import ClusterSettings

Tree = dict[str, Any]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

POLICIES = [
    one
    for path in sorted((Path(__file__).parents[2] / "k8s/components/policies").glob("*.yaml"))
    for one in yaml.safe_load_all(path.read_text())
]


@functools.cache
def applied() -> dict[str, Tree]:
    objects = yaml.load_all((GOLDEN / "prod-gpu.yaml").read_text(), _LOADER)
    return {one["kind"]: one for one in objects if one["kind"] in PLURALS}


def job() -> Tree:
    return copy.deepcopy(applied()["RayJob"])


def service() -> Tree:
    return copy.deepcopy(applied()["RayService"])


def cluster() -> Tree:
    metadata = {"name": "c", "namespace": "tandem"}
    spec = service()["spec"]["rayClusterConfig"]
    return {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": metadata, "spec": spec}


def schedule() -> Tree:
    spec = {"schedule": "@daily", "jobTemplate": job()["spec"]}
    return {"apiVersion": "ray.io/v1", "kind": "RayCronJob", "metadata": {"name": "s"}, "spec": spec}


def of_others() -> Tree:
    found = job()
    del found["spec"]["rayClusterSpec"]
    found["spec"]["clusterSelector"] = {"ray.io/cluster": "c"}
    return found


def old_workers_gone() -> Tree:
    found = cluster()
    del found["spec"]["workerGroupSpecs"]
    return found


KINDS: dict[str, tuple[Callable[[], Tree], Callable[[Tree], Tree]]] = {
    "RayCluster": (cluster, lambda one: one["spec"]),
    "RayService": (service, lambda one: one["spec"]["rayClusterConfig"]),
    "RayJob": (job, lambda one: one["spec"]["rayClusterSpec"]),
    "RayCronJob": (schedule, lambda one: one["spec"]["jobTemplate"]["rayClusterSpec"]),
}


def _first(spec: Tree) -> Tree:
    found: Tree = spec["workerGroupSpecs"][-1]["template"]["spec"]
    return found


OF_CLUSTERS: dict[str, tuple[Callable[[Tree], object], str]] = {
    "no authentication": (lambda c: c.pop("authOptions"), "mode must be token"),
    "authentication off": (lambda c: c["authOptions"].update(mode="disabled"), "mode must be token"),
    "mode left out": (lambda c: c["authOptions"].pop("mode"), "mode must be token"),
    "a token that rotates": (lambda c: c["authOptions"].pop("secretName"), "secretName must name"),
    "an empty Secret": (lambda c: c["authOptions"].update(secretName=""), "secretName must name"),
    "a tag on the head": (
        lambda c: c["headGroupSpec"]["template"]["spec"]["containers"][0].update(image="ray:2.60.0"),
        "images of containers",
    ),
    "a tag on the last group": (
        lambda c: _first(c)["containers"][0].update(image="x/ray:2"),
        "images of containers",
    ),
    "no image": (lambda c: _first(c)["containers"][0].pop("image"), "images of containers"),
    "half a digest": (
        lambda c: _first(c)["containers"][0].update(image="ray@sha256:0123"),
        "images of containers",
    ),
    "a tag before the start": (
        lambda c: _first(c).update(initContainers=[{"name": "i", "image": "busybox:1"}]),
        "images of initContainers",
    ),
    "a load balancer": (lambda c: c["headGroupSpec"].update(serviceType="LoadBalancer"), "serviceType"),
    "a port of the nodes": (lambda c: c["headGroupSpec"].update(serviceType="NodePort"), "serviceType"),
    "a head service outside": (
        lambda c: c["headGroupSpec"].update(headService={"spec": {"type": "LoadBalancer"}}),
        "headService.spec.type",
    ),
    "an ingress": (lambda c: c["headGroupSpec"].update(enableIngress=True), "enableIngress"),
    "workers with a token": (
        lambda c: _first(c).update(automountServiceAccountToken=True),
        "automountServiceAccountToken",
    ),
    "a token by default": (
        lambda c: _first(c).pop("automountServiceAccountToken"),
        "automountServiceAccountToken",
    ),
    "nobody's account": (lambda c: _first(c).pop("serviceAccountName"), "service account of their own"),
    "the default account": (
        lambda c: _first(c).update(serviceAccountName="default"),
        "service account of their own",
    ),
}

HARMLESS: dict[str, Callable[[Tree], object]] = {
    "more replicas": lambda c: c["workerGroupSpecs"][0].update(maxReplicas=20),
    "a head service inside": lambda c: c["headGroupSpec"].update(headService={"spec": {"type": "ClusterIP"}}),
    "a service type inside": lambda c: c["headGroupSpec"].update(serviceType="ClusterIP"),
    "an ingress that is off": lambda c: c["headGroupSpec"].update(enableIngress=False),
    "a label": lambda c: c["headGroupSpec"]["template"]["metadata"]["labels"].update(team="a"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", OF_CLUSTERS)
def test_each_edit_is_refused_with_its_own_message_and_no_other(kind: str, edit: str) -> None:
    make, cluster_of = KINDS[kind]
    manifest = make()
    change, message = OF_CLUSTERS[edit]
    change(cluster_of(manifest))
    found = refusals(POLICIES, manifest)
    assert len(found) == 1, found
    assert message in found[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("edit", HARMLESS)
def test_harmless_edits_pass(kind: str, edit: str) -> None:
    make, cluster_of = KINDS[kind]
    manifest = make()
    HARMLESS[edit](cluster_of(manifest))
    assert refusals(POLICIES, manifest) == []


@pytest.mark.parametrize(
    "code",
    [
        "working_dir: https://github.com/x/y/archive/main.zip",
        "env_vars: {A: b}\nworking_dir: s3://bucket/code.zip\n",
        '{"working_dir": "https://x/y.zip"}',
        "py_modules:\n- https://x/y.zip",
        "pip: [evil]",
        "{uv: {packages: [evil]}}",
        "conda: env.yaml",
        "image_uri: x/y:latest",
    ],
)
def test_code_from_elsewhere_is_refused(code: str) -> None:
    for manifest, spec in ((job(), "spec"), (schedule(), "jobTemplate")):
        found = manifest["spec"] if spec == "spec" else manifest["spec"][spec]
        found["runtimeEnvYAML"] = code
        (only,) = refusals(POLICIES, manifest)
        assert "bring code" in only
    served = service()
    served["spec"]["serveConfigV2"] += "  runtime_env:\n    " + code.replace("\n", "\n    ")
    (only,) = refusals(POLICIES, served)
    assert "bring code" in only


def test_settings_of_a_runtime_environment_pass() -> None:
    manifest = job()
    manifest["spec"]["runtimeEnvYAML"] = (
        "env_vars: {AWS_REGION: eu-central-1}\nconfig: {eager_install: false}"
    )
    assert refusals(POLICIES, manifest) == []


@pytest.mark.parametrize("make", [job, service, cluster, schedule, of_others, old_workers_gone])
def test_what_is_applied_passes(make: Callable[[], Tree]) -> None:
    assert refusals(POLICIES, make()) == []


@pytest.mark.parametrize("file", ["recipe.yaml", "service.yaml"])
def test_what_the_examples_settings_render_passes(file: str) -> None:
    settings = load_yaml(ClusterSettings, EXAMPLES / "settings.yaml")
    for manifest in render(EXAMPLES / file, settings):
        assert refusals(POLICIES, manifest) == []


def test_every_policy_is_bound_and_every_binding_has_its_policy() -> None:
    names = {one["metadata"]["name"] for one in POLICIES if one["kind"] == "ValidatingAdmissionPolicy"}
    bindings = [one for one in POLICIES if one["kind"] == "ValidatingAdmissionPolicyBinding"]
    assert {one["spec"]["policyName"] for one in bindings} == names
    assert all("Deny" in one["spec"]["validationActions"] for one in bindings)
    assert len(names) == 5
