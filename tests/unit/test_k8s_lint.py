"""Manifests in all layers: what is rendered passes, what one edit breaks is named at its place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from kuberay_crds import EXAMPLES, FOLDER, crds
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import load_yaml
from k8s.lint.layers import lint
from k8s.render import render, render_service
from k8s.settings import ClusterSettings
from k8s.yamltext import to_yaml
from serving.service import Service

Tree = dict[str, Any]
Edit = Callable[[Tree], object]

SERVICE = Service.model_validate(
    {
        "store": "s3://b/store",
        "models": [
            {"model": "digits@live", "replicas": {"min": 1, "max": 4, "cpus": 2}},
            {"model": "words@live", "replicas": {"min": 0, "max": 2, "cpus": 1, "gpus": 1}},
        ],
    }
)


def manifests() -> list[Tree]:
    return copy.deepcopy(render_service(SERVICE, ClusterSettings()))


def served(objects: list[Tree]) -> Tree:
    found: Tree = next(one for one in objects if one["kind"] == "RayService")["spec"]
    return found


def pod(objects: list[Tree]) -> Tree:
    found: Tree = served(objects)["rayClusterConfig"]["workerGroupSpecs"][0]["template"]["spec"]
    return found


def container(objects: list[Tree]) -> Tree:
    found: Tree = pod(objects)["containers"][0]
    return found


def serve_config(objects: list[Tree], edit: Edit) -> None:
    config = yaml.safe_load(served(objects)["serveConfigV2"])
    edit(config["applications"][0]["args"]["service"])
    served(objects)["serveConfigV2"] = to_yaml(config)


def quota(objects: list[Tree], **hard: str) -> None:
    metadata = {"name": "quota", "namespace": "tandem"}
    objects.append(
        {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": {"hard": hard}}
    )


def findings(edit: Callable[[list[Tree]], object]) -> list[str]:
    objects = manifests()
    edit(objects)
    return [str(one) for one in lint(objects, None).findings]


@pytest.mark.parametrize("file", ["recipe.yaml", "service.yaml"])
def test_what_is_rendered_passes_every_layer(file: str) -> None:
    settings = load_yaml(ClusterSettings, EXAMPLES / "settings.yaml")
    for chosen in (settings, ClusterSettings()):
        assert lint(render(EXAMPLES / file, chosen), crds()).findings == ()


RESTRICTED: dict[str, tuple[Callable[[list[Tree]], object], str]] = {
    "the node's network": (lambda m: pod(m).update(hostNetwork=True), "hostNetwork"),
    "a volume of the node": (
        lambda m: pod(m)["volumes"].append({"name": "h", "hostPath": {"path": "/"}}),
        "hostPath",
    ),
    "a kernel setting": (
        lambda m: pod(m)["securityContext"].update(sysctls=[{"name": "kernel.msgmax", "value": "1"}]),
        "kernel.msgmax",
    ),
    "all rights": (lambda m: container(m)["securityContext"].update(privileged=True), "privileged"),
    "rights to gain": (
        lambda m: container(m)["securityContext"].pop("allowPrivilegeEscalation"),
        "allowPrivilegeEscalation",
    ),
    "capabilities kept": (
        lambda m: container(m)["securityContext"].update(capabilities={"drop": ["NET_RAW"]}),
        "capabilities.drop",
    ),
    "capabilities added": (
        lambda m: container(m)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
        "SYS_ADMIN",
    ),
    "root": (
        lambda m: (
            container(m)["securityContext"].pop("runAsNonRoot"),
            pod(m)["securityContext"].pop("runAsNonRoot"),
        ),
        "runAsNonRoot",
    ),
    "user 0": (lambda m: pod(m)["securityContext"].update(runAsUser=0), "runAsUser"),
    "no filter": (
        lambda m: (
            container(m)["securityContext"].pop("seccompProfile"),
            pod(m)["securityContext"].pop("seccompProfile"),
        ),
        "seccompProfile",
    ),
    "a port of the node": (
        lambda m: container(m)["ports"].append({"containerPort": 1, "hostPort": 1}),
        "hostPort",
    ),
    "the autoscaler that the operator adds": (
        lambda m: served(m)["rayClusterConfig"]["autoscalerOptions"].pop("securityContext"),
        "autoscaler (added by the operator",
    ),
}
ACROSS: dict[str, tuple[Callable[[list[Tree]], object], str]] = {
    "more GPUs than pods have": (
        lambda m: served(m)["rayClusterConfig"]["workerGroupSpecs"][0].update(maxReplicas=1),
        "more GPUs than all pods have",
    ),
    "more CPUs than pods have": (
        lambda m: [
            group.update(maxReplicas=1) for group in served(m)["rayClusterConfig"]["workerGroupSpecs"]
        ],
        "more CPUs than all pods have",
    ),
    "a pod killed while it drains": (
        lambda m: pod(m).update(terminationGracePeriodSeconds=5),
        "killed while its replicas still drain",
    ),
    "a batch that never forms": (
        lambda m: serve_config(m, lambda service: service["models"][0].update(max_batch_size=4096)),
        "a full batch never forms",
    ),
    "accepted and cut off": (
        lambda m: serve_config(m, lambda service: service["models"][0].update(slo_ms=60_000)),
        "cut off by a drain",
    ),
    "beyond the quota of GPUs": (
        lambda m: quota(m, **{"requests.nvidia.com/gpu": "1"}),
        "more GPUs than the quota",
    ),
    "beyond the quota of CPUs": (lambda m: quota(m, **{"limits.cpu": "4"}), "more CPUs than the quota"),
    "no YAML": (lambda m: served(m).update(serveConfigV2="a: ["), "it isn't YAML"),
}


@pytest.mark.parametrize(("edit", "told"), RESTRICTED.values(), ids=RESTRICTED.keys())
def test_what_pod_security_refuses(edit: Callable[[list[Tree]], object], told: str) -> None:
    found = findings(edit)
    assert any(told in one and "restricted" in one for one in found), found


def test_a_job_without_a_submitter_template() -> None:
    objects = render(EXAMPLES / "recipe.yaml", ClusterSettings())
    job = next(one for one in objects if one["kind"] == "RayJob")
    job["spec"].pop("submitterPodTemplate")
    assert any("submitterPodTemplate" in str(one) for one in lint(objects, None).findings)


@pytest.mark.parametrize(("edit", "told"), ACROSS.values(), ids=ACROSS.keys())
def test_what_does_not_fit_together(edit: Callable[[list[Tree]], object], told: str) -> None:
    found = findings(edit)
    assert any(told in one for one in found), found


def test_enough_quota_is_enough() -> None:
    assert findings(lambda m: quota(m, **{"limits.cpu": "1000", "requests.nvidia.com/gpu": "8"})) == []


def test_the_command(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    objects = manifests()
    good.write_text(to_yaml(*objects))
    pod(objects)["hostNetwork"] = True
    bad.write_text(to_yaml(*objects))
    options = ["--crds", str(FOLDER)] if FOLDER.is_dir() else []
    done = CliRunner().invoke(app, ["k8s", "lint", str(good), *options])
    assert (done.exit_code, "nothing found" in done.output) == (0, True), done.output
    done = CliRunner().invoke(app, ["k8s", "lint", str(bad), *options])
    assert (done.exit_code, "hostNetwork" in done.output) == (2, True), done.output
