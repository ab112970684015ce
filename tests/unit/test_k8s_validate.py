"""The strict validator refuses what an API server refuses, and what it would drop silently."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from kuberay_crds import EXAMPLES, crds

from cluster.config import load_yaml
from cluster.errors import BadInput
from k8s import cel
from k8s.render import render
from k8s.schema import Schema, check
from k8s.settings import ClusterSettings
from k8s.validate import Crds

Mutation = Callable[[dict[str, Any]], object]


def manifest(kind: str) -> dict[str, Any]:
    """A fresh, valid RayJob or RayService with everything switched on."""
    example = {"RayJob": "recipe.yaml", "RayService": "service.yaml"}[kind]
    where = load_yaml(ClusterSettings, EXAMPLES / "settings.yaml")
    return next(found for found in render(EXAMPLES / example, where) if found["kind"] == kind)


def head(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    return found


def container(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = head(job)["containers"][0]
    return found


REFUSED: dict[str, tuple[Mutation, str]] = {
    "unknown at the top": (lambda j: j.update(extra=1), "unknown field"),
    "unknown in the spec": (lambda j: j["spec"].update(shutdownAfterJobFinish=True), "unknown field"),
    "unknown in a container": (lambda j: container(j).update(resource={}), "unknown field"),
    "unknown in a pod's metadata": (
        lambda j: j["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"].update(label={}),
        "unknown field",
    ),
    "unknown in metadata": (lambda j: j["metadata"].update(lables={}), "unknown field"),
    "no name": (lambda j: j["metadata"].pop("name"), "'name' is missing"),
    "text for a number": (lambda j: j["spec"].update(backoffLimit="3"), "wrong type"),
    "a fraction for a number": (lambda j: j["spec"].update(backoffLimit=1.5), "wrong type"),
    "true for a number": (lambda j: j["spec"].update(backoffLimit=True), "wrong type"),
    "a number too large": (lambda j: j["spec"].update(backoffLimit=2**31), "no int32"),
    "a number too small": (lambda j: j["spec"].update(preRunningDeadlineSeconds=0), "too little"),
    "a number for a label": (lambda j: j["metadata"]["labels"].update(version=1), "wrong type"),
    "a list for an object": (lambda j: j["spec"].update(rayClusterSpec=[]), "wrong type"),
    "no head": (lambda j: j["spec"]["rayClusterSpec"].pop("headGroupSpec"), "'headGroupSpec' is missing"),
    "a container without a name": (lambda j: container(j).pop("name"), "'name' is missing"),
    "a mount without a path": (lambda j: container(j)["volumeMounts"][0].pop("mountPath"), "is missing"),
    "not one of the values": (
        lambda j: j["spec"]["rayClusterSpec"]["authOptions"].update(mode="none"),
        "not one of the values",
    ),
    "not a quantity": (
        lambda j: container(j)["resources"]["limits"].update(cpu="two"),
        "doesn't follow the pattern",
    ),
    "an environment variable twice": (
        lambda j: container(j)["env"].append({"name": "HOME", "value": "/"}),
        "twice in the list",
    ),
    "a port twice, once with the default protocol": (
        lambda j: container(j)["ports"].append({"containerPort": 8265, "protocol": "TCP"}),
        "twice in the list",
    ),
    "a volume twice": (lambda j: head(j)["volumes"].append({"name": "tmp"}), "twice in the list"),
    "a null in a list": (lambda j: head(j)["volumes"].append(None), "wrong type"),
    "a null that is required": (lambda j: container(j).update(name=None), "'name' is missing"),
    "both kinds of deletion policy": (
        lambda j: j["spec"].update(
            deletionStrategy={"onSuccess": {"policy": "DeleteSelf"}, "deletionRules": [rule("jobStatus")]}
        ),
        "cannot be used together",
    ),
    "an empty deletion strategy": (lambda j: j["spec"].update(deletionStrategy={}), "cannot be empty"),
    "another manager": (lambda j: j["spec"].update(managedBy="me"), "managedBy field value must be"),
    "no such kind": (lambda j: j.update(kind="RayJobs"), "no such kind"),
    "no such version": (lambda j: j.update(apiVersion="ray.io/v2"), "no such kind"),
}

TAKEN: dict[str, Mutation] = {
    "a null where nothing is required": lambda j: j["spec"].update(runtimeEnvYAML=None),
    "a null where there is a default": lambda j: j["spec"].update(submissionMode=None),
    "a number for a quantity": lambda j: container(j)["resources"]["limits"].update(cpu=2),
    "one port for two protocols": lambda j: container(j)["ports"].append(
        {"containerPort": 8265, "protocol": "UDP"}
    ),
    "deletion rules alone": lambda j: j["spec"].update(
        deletionStrategy={"deletionRules": [rule("jobStatus")]}
    ),
    "any label": lambda j: j["metadata"]["labels"].update({"a/b": "c"}),
    "a status": lambda j: j.update(status={"jobStatus": "RUNNING"}),
}


def rule(condition: str) -> dict[str, Any]:
    return {"policy": "DeleteSelf", "condition": {condition: "SUCCEEDED"}}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    mutate, problem = REFUSED[name]
    job = manifest("RayJob")
    mutate(job)
    found = "\n".join(map(str, crds().check([job]).findings))
    assert problem in found


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str) -> None:
    job = manifest("RayJob")
    TAKEN[name](job)
    assert crds().check([job]).findings == ()


def test_what_is_checked_stays_as_it_was() -> None:
    job = manifest("RayJob")
    before = copy.deepcopy(job)
    crds().check([job])
    assert job == before, "defaults are filled into a copy"


def test_what_could_not_be_checked_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    service = manifest("RayService")
    report = crds().check([service, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}}])
    assert "v1 ConfigMap" in report.unchecked
    assert any(rule.startswith("about a change") for rule in report.unchecked)
    job = manifest("RayJob")
    job["spec"]["managedBy"] = "me"
    monkeypatch.setattr(cel, "available", lambda: False)
    report = crds().check([job])
    assert report.valid
    assert any(rule.startswith("CEL: self in") for rule in report.unchecked)


def test_a_keyword_we_dont_know_is_not_passed_over() -> None:
    with pytest.raises(AssertionError, match="oneOf"):
        check({}, {"type": "object", "oneOf": []}, "x")


def test_a_folder_without_crds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput):
        Crds.load(tmp_path)
    (tmp_path / "x.yaml").write_text("a: 1\n")
    with pytest.raises(BadInput):
        Crds.load(tmp_path)


def strict(schema: Any) -> Any:
    """The schema as strict JSON Schema, for a validator that we did not write."""
    if isinstance(schema, list):
        return [strict(child) for child in schema]
    if not isinstance(schema, dict):
        return schema
    made: dict[str, Any] = {}
    for name, child in schema.items():
        if name == "properties":
            made[name] = {field: strict(below) for field, below in child.items()}
        elif not name.startswith("x-kubernetes-") and name not in ("default", "format"):
            made[name] = strict(child)
    if made.get("type") == "object" and "additionalProperties" not in made:
        made["additionalProperties"] = False
    return made


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in plain data, the string maps left out: any key is right there."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], dict | list) and key not in ("labels", "annotations", "matchLabels"):
            found += places(value[key])
    return found


def mutate(value: dict[str, Any], chance: random.Random) -> None:
    parent, key = chance.choice(places(value))
    kind = chance.randrange(5)
    if kind == 0 and isinstance(parent, dict):
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[f"{key}x"] = parent[key]
    elif kind == 2:
        parent[key] = chance.choice([7, "text", True, [], {}, 1.5, -1])
    elif kind == 3 and isinstance(parent[key], str):
        parent[key] += "?"
    else:
        parent[key] = [parent[key]]


@pytest.mark.parametrize("kind", ["RayJob", "RayService"])
def test_an_independent_validator_agrees_on_mutations(kind: str) -> None:
    schema: Schema = crds().schema("ray.io/v1", kind)
    peer = jsonschema.Draft202012Validator(strict(schema))
    chance = random.Random(0)
    ours_alone = {"twice in the list", "breaks a rule", "no int32", "no int64"}
    refused = 0
    for _ in range(150):
        mutant = manifest(kind)
        mutate(mutant, chance)
        findings, _ = check(mutant, schema, kind)  # fills in defaults, which the peer doesn't know
        comparable = [finding for finding in findings if finding.problem not in ours_alone]
        assert bool(comparable) is not peer.is_valid(mutant), yaml.safe_dump([str(f) for f in findings])
        refused += bool(comparable)
    assert 30 < refused < 150, "mutations of both kinds"
