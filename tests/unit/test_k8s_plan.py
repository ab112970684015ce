"""What applying a change does: a table of changes, one for each class of fields of the operator's hash."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.errors import BadInput, NotFound
from k8s.changes import Change
from k8s.demand import Demand, cpu, demand
from k8s.options import Schedule
from k8s.plan import plan
from k8s.planned import read_manifests
from k8s.rayschedule import render_schedule
from k8s.render import render_recipe, render_service
from k8s.settings import ClusterSettings
from k8s.yamltext import to_yaml
from serving.service import Service
from training.recipe import Recipe

Edit = Callable[[dict[str, Any]], None]

SERVICE = Service.model_validate(
    {
        "store": "s3://b/store",
        "models": [
            {"model": "digits@live", "replicas": {"min": 2, "max": 4, "cpus": 1}},
            {"model": "words@live", "replicas": {"min": 1, "max": 2, "cpus": 4, "gpus": 1}},
        ],
    }
)
RECIPE = Recipe.model_validate(
    {
        "model": "digits",
        "task": "image-classification",
        "data": {"train": "s3://b/train", "eval": "s3://b/eval"},
        "store": "s3://b/store",
    }
)


def manifests() -> list[dict[str, Any]]:
    return copy.deepcopy(render_service(SERVICE, ClusterSettings()))


def job() -> list[dict[str, Any]]:
    return copy.deepcopy(render_recipe(RECIPE, ClusterSettings(), "run"))


def the(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(one for one in objects if one["kind"] == kind)


def cluster(objects: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = the(objects, "RayService")["spec"]["rayClusterConfig"]
    return found


def group(objects: list[dict[str, Any]], number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = cluster(objects)["workerGroupSpecs"][number]
    return found


def pod(objects: list[dict[str, Any]], number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = group(objects, number)["template"]
    return found


def head(objects: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = cluster(objects)["headGroupSpec"]
    return found


def container(objects: list[dict[str, Any]], number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = pod(objects, number)["spec"]["containers"][0]
    return found


def changed(edit: Callable[[list[dict[str, Any]]], object]) -> tuple[Change, ...]:
    old, new = manifests(), manifests()
    edit(new)
    return plan(old, new).changes


def put(found: dict[str, Any], **values: Any) -> None:
    found.update(values)


def extra_group(objects: list[dict[str, Any]], at: int) -> None:
    added = copy.deepcopy(group(objects))
    added["groupName"] = "more"
    cluster(objects)["workerGroupSpecs"].insert(at, added)


NEW_CLUSTER: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "image of a group": lambda m: put(container(m), image="tandem-ray:0.2.0"),
    "image of the head": lambda m: put(
        head(m)["template"]["spec"]["containers"][0], image="tandem-ray:0.2.0"
    ),
    "an environment variable": lambda m: (
        container(m).setdefault("env", []).append({"name": "A", "value": "1"})
    ),
    "a label of a pod": lambda m: put(pod(m)["metadata"]["labels"], team="vision"),
    "an annotation of a pod": lambda m: pod(m)["metadata"].update(annotations={"restarted": "1"}),
    "CPUs of a group": lambda m: put(container(m)["resources"]["limits"], cpu="8"),
    "memory of a group": lambda m: put(container(m)["resources"]["limits"], memory="64Gi"),
    "CPUs of the head": lambda m: put(
        head(m)["template"]["spec"]["containers"][0]["resources"]["limits"], cpu="16"
    ),
    "the Ray version": lambda m: put(cluster(m), rayVersion="2.61.0"),
    "a start parameter": lambda m: put(group(m)["rayStartParams"], **{"object-store-memory": "1000000000"}),
    "a start parameter of the head": lambda m: put(head(m)["rayStartParams"], **{"num-cpus": "1"}),
    "the autoscaler's idle time": lambda m: put(cluster(m)["autoscalerOptions"], idleTimeoutSeconds=30),
    "the autoscaler off": lambda m: put(cluster(m), enableInTreeAutoscaling=False),
    "the Secret of the token": lambda m: put(cluster(m)["authOptions"], secretName="other"),
    "Redis": lambda m: put(cluster(m), gcsFaultToleranceOptions={"redisAddress": "redis:6379"}),
    "a node selector": lambda m: pod(m)["spec"].update(nodeSelector={"zone": "a"}),
    "a priority class": lambda m: pod(m)["spec"].update(priorityClassName="high"),
    "a grace period": lambda m: pod(m)["spec"].update(terminationGracePeriodSeconds=999),
    "a volume": lambda m: pod(m)["spec"].setdefault("volumes", []).append({"name": "v", "emptyDir": {}}),
    "a group's name": lambda m: put(group(m), groupName="other"),
    "a group removed": lambda m: cluster(m)["workerGroupSpecs"].pop(),
    "a group in front": lambda m: extra_group(m, 0),
    "the order of groups": lambda m: cluster(m)["workerGroupSpecs"].reverse(),
    "a group at the end, and an image": lambda m: (extra_group(m, 2), put(container(m), image="x:2")),
    "the idle time of a group": lambda m: put(group(m), idleTimeoutSeconds=30),
    "the service account": lambda m: pod(m)["spec"].update(serviceAccountName="other"),
    "the order of variables": lambda m: container(m)["env"].reverse(),
    "a label of Ray's node": lambda m: put(group(m), labels={"zone": "a"}),
    "resources of Ray's node": lambda m: put(group(m), resources={"CPU": "2"}),
    "the autoscaler's image": lambda m: put(cluster(m)["autoscalerOptions"], image="x:2"),
    "hosts of a replica": lambda m: put(group(m), numOfHosts=2),
    "a priority of a group": lambda m: put(group(m), priority=1),
    "a mounted volume": lambda m: container(m)["volumeMounts"].append({"name": "tmp", "mountPath": "/v"}),
    "a probe": lambda m: put(container(m)["readinessProbe"], periodSeconds=9),
    "a security context": lambda m: put(pod(m)["spec"]["securityContext"], runAsUser=7),
    "an init container": lambda m: pod(m)["spec"].update(initContainers=[{"name": "i", "image": "i:1"}]),
    "a second container": lambda m: pod(m)["spec"]["containers"].append({"name": "c", "image": "c:1"}),
    "spreading over nodes": lambda m: pod(m)["spec"].pop("topologySpreadConstraints"),
    "an affinity": lambda m: pod(m)["spec"].update(affinity={"nodeAffinity": {}}),
    "the head's service": lambda m: put(head(m), serviceType="LoadBalancer"),
    "bounds, and an image": lambda m: (put(group(m), maxReplicas=40), put(container(m), image="x:2")),
}
WAITS: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "replicas": lambda m: put(group(m), replicas=3),
    "fewest replicas": lambda m: put(group(m), minReplicas=1),
    "most replicas": lambda m: put(group(m), maxReplicas=40),
    "all bounds": lambda m: put(group(m), replicas=3, minReplicas=3, maxReplicas=9),
    "workers to delete": lambda m: put(group(m), scaleStrategy={"workersToDelete": ["a"]}),
    "tolerations of a group": lambda m: pod(m)["spec"].update(tolerations=[{"operator": "Exists"}]),
    "tolerations of the head": lambda m: head(m)["template"]["spec"].update(
        tolerations=[{"operator": "Exists"}]
    ),
    "scheduling gates": lambda m: pod(m)["spec"].update(schedulingGates=[{"name": "gate"}]),
    "an upgrade strategy of the cluster": lambda m: put(cluster(m), upgradeStrategy={"type": "Recreate"}),
    "a label of the service": lambda m: put(the(m, "RayService")["metadata"]["labels"], team="vision"),
    "an annotation of the service": lambda m: put(the(m, "RayService")["metadata"]["annotations"], a="b"),
}
IN_PLACE: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "what is served": lambda m: put(the(m, "RayService")["spec"], serveConfigV2="applications: []\n"),
    "a group at the end": lambda m: extra_group(m, 2),
    "a group at the end, and other bounds": lambda m: (extra_group(m, 2), put(group(m), maxReplicas=40)),
    "the upgrade strategy": lambda m: put(the(m, "RayService")["spec"], upgradeStrategy={"type": "None"}),
    "the head in the data path": lambda m: put(
        the(m, "RayService")["spec"], excludeHeadPodFromServeSvc=False
    ),
    "when the old cluster goes": lambda m: put(
        the(m, "RayService")["spec"], rayClusterDeletionDelaySeconds=5
    ),
    "suspended": lambda m: put(the(m, "RayService")["spec"], suspend=True),
    "who may reach it": lambda m: put(the(m, "NetworkPolicy")["spec"], ingress=[]),
    "how many may be evicted": lambda m: put(the(m, "PodDisruptionBudget")["spec"], minAvailable=1),
    "a service account's identity": lambda m: put(
        the(m, "ServiceAccount")["metadata"], annotations={"role": "reader"}
    ),
}
NOTHING: dict[str, Callable[[list[dict[str, Any]]], object]] = {
    "nothing at all": lambda m: None,
    "a status": lambda m: put(the(m, "RayService"), status={"activeServiceStatus": {}}),
    "what the API server adds": lambda m: put(the(m, "RayService")["metadata"], uid="1", resourceVersion="2"),
    "what kubectl notes": lambda m: put(
        the(m, "RayService")["metadata"]["annotations"],
        **{"kubectl.kubernetes.io/last-applied-configuration": "{}"},
    ),
    "what is empty, or off": lambda m: (
        put(container(m), envFrom=[]),
        pod(m)["spec"].update(hostNetwork=False, nodeSelector={}),
        put(container(m)["volumeMounts"][0], readOnly=False),
    ),
    "nulls": lambda m: put(group(m), idleTimeoutSeconds=None, scaleStrategy=None),
    "the order of objects": lambda m: m.reverse(),
}


@pytest.mark.parametrize("edit", NEW_CLUSTER.values(), ids=NEW_CLUSTER.keys())
def test_a_new_cluster(edit: Callable[[list[dict[str, Any]]], object]) -> None:
    changes = changed(edit)
    assert {change.effect for change in changes} == {"new cluster"}
    assert any(change.cause for change in changes)


@pytest.mark.parametrize("edit", WAITS.values(), ids=WAITS.keys())
def test_what_waits(edit: Callable[[list[dict[str, Any]]], object]) -> None:
    assert {change.effect for change in changed(edit)} == {"waits"}


@pytest.mark.parametrize("edit", IN_PLACE.values(), ids=IN_PLACE.keys())
def test_what_changes_in_place(edit: Callable[[list[dict[str, Any]]], object]) -> None:
    assert {change.effect for change in changed(edit)} == {"in place"}


@pytest.mark.parametrize("edit", NOTHING.values(), ids=NOTHING.keys())
def test_what_changes_nothing(edit: Callable[[list[dict[str, Any]]], object]) -> None:
    assert changed(edit) == ()


@pytest.mark.parametrize("name", ["image of a group", "a label of a pod", "the Ray version"])
def test_without_upgrades_a_change_waits(name: str) -> None:
    old, new = manifests(), manifests()
    for objects in (old, new):
        the(objects, "RayService")["spec"]["upgradeStrategy"] = {"type": "None"}
    NEW_CLUSTER[name](new)
    the(new, "RayService")["spec"]["serveConfigV2"] = "applications: []\n"
    found = plan(old, new)
    assert found.effects == {"waits", "in place"}, "the old cluster is given the new configuration of Serve"
    assert found.extra_at_most == Demand(0, 0)


def test_the_fields_that_are_to_blame() -> None:
    def edit(objects: list[dict[str, Any]]) -> None:
        put(container(objects), image="x:2")
        put(group(objects), maxReplicas=40)

    blamed = {change.path: change.cause for change in changed(edit)}
    groups = "spec.rayClusterConfig.workerGroupSpecs[0]"
    assert blamed == {f"{groups}.template.spec.containers[0].image": True, f"{groups}.maxReplicas": False}


def test_what_a_new_cluster_asks_for_beside_the_old() -> None:
    old, new = manifests(), manifests()
    put(container(new), image="x:2")
    found = plan(old, new)
    own = sum(
        (demand(one) * one["minReplicas"] for one in cluster(new)["workerGroupSpecs"]), demand(head(new))
    )
    end = sum(
        (demand(one) * one["maxReplicas"] for one in cluster(new)["workerGroupSpecs"]), demand(head(new))
    )
    assert found.extra_at_first == own
    assert found.extra_at_most == end
    assert found.extra_at_most.gpus == 2
    assert any("NewClusterWithIncrementalUpgrade" in line for line in found.advice)


def test_a_surge_bounds_what_is_asked_for() -> None:
    old, new = manifests(), manifests()
    for objects in (old, new):
        the(objects, "RayService")["spec"]["upgradeStrategy"] = {
            "type": "NewClusterWithIncrementalUpgrade",
            "clusterUpgradeOptions": {"maxSurgePercent": 50, "gatewayClassName": "istio"},
        }
    put(container(new), image="x:2")
    found = plan(old, new)
    assert found.extra_at_first.gpus == 1
    assert found.extra_at_most.gpus == 1.5
    assert not any("doubled" in line for line in found.advice)


def test_a_running_job_keeps_what_it_began_with() -> None:
    old, new = job(), job()
    the(new, "RayJob")["spec"]["rayClusterSpec"]["rayVersion"] = "2.61.0"
    the(new, "RayJob")["spec"]["backoffLimit"] = 9
    assert plan(old, new).effects == {"waits"}
    the(new, "RayJob")["spec"]["suspend"] = True
    assert plan(old, new).effects == {"waits", "in place"}


def test_a_schedule_holds_from_the_next_time_on() -> None:
    for schedule in ({"cron": "@daily"}, {"cron": "@daily", "by": "RayCronJob", "concurrency": "Allow"}):
        kept = {"cleanup": {"succeeded": {"record_s": 9}, "failed": {"record_s": 3600}}}
        where = ClusterSettings.model_validate({"job": kept})
        old = copy.deepcopy(render_schedule(RECIPE, where, Schedule.model_validate(schedule), "nightly"))
        new = copy.deepcopy(old)
        new[-1]["spec"]["schedule"] = "@weekly"
        (change,) = plan(old, new).changes
        assert (change.effect, "next time" in change.why) == ("in place", True)


def test_objects_that_come_and_go() -> None:
    old, new = manifests(), manifests()
    new.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "more"}})
    old.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "less"}})
    found = {change.object: change.effect for change in plan(old, new).changes}
    assert found == {"ConfigMap/more": "new object", "ConfigMap/less": "left behind"}


def test_the_strategy_that_suits() -> None:
    def found(edit: Callable[[list[dict[str, Any]]], object]) -> dict[str, str]:
        old, new = manifests(), manifests()
        edit(new)
        return dict(plan(old, new).strategies)

    name = f"RayService/{SERVICE.name}"
    assert found(NEW_CLUSTER["image of a group"]) == {name: "NewClusterWithIncrementalUpgrade"}
    assert found(NEW_CLUSTER["the autoscaler off"]) == {name: "NewCluster"}, "steps need the autoscaler"
    assert found(NEW_CLUSTER["a group removed"]) == {name: "NewCluster"}, "without GPUs a second one is cheap"
    assert found(WAITS["replicas"]) == {}


def alone(**spec: Any) -> list[dict[str, Any]]:
    found = {**copy.deepcopy(cluster(manifests())), **spec}
    return [{"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "c"}, "spec": found}]


def test_a_cluster_that_stands_alone() -> None:
    old = alone()
    bounds, grown, image = alone(), alone(), alone()
    bounds[0]["spec"]["workerGroupSpecs"][0]["maxReplicas"] = 40
    grown[0]["spec"]["workerGroupSpecs"].append({"groupName": "more"})
    image[0]["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["image"] = "x:2"
    assert plan(old, bounds).effects == {"in place"}
    assert plan(old, grown).effects == {"in place"}
    assert plan(old, image).effects == {"waits"}
    for one in (old, image):
        one[0]["spec"]["upgradeStrategy"] = {"type": "Recreate"}
    found = plan(old, image)
    assert found.effects == {"new cluster"}
    assert found.extra_at_most == Demand(0, 0), "the old pods go first"


def test_drift_is_told() -> None:
    old, new = manifests(), manifests()
    put(group(new), maxReplicas=40)
    (line,) = plan(old, new).advice
    assert "differ from what is written" in line


@pytest.mark.parametrize(("text", "cpus"), [("500m", 0.5), ("2", 2.0), (1.5, 1.5), (4, 4.0)])
def test_cpus_as_kubernetes_writes_them(text: str | float, cpus: float) -> None:
    assert cpu(text) == cpus


def test_the_command(tmp_path: Path) -> None:
    for name, image in (("old", "tandem-ray:0.1.0"), ("new", "tandem-ray:0.2.0")):
        settings = ClusterSettings(image=image)
        (tmp_path / name).mkdir()
        text = to_yaml(*render_service(SERVICE, settings))
        (tmp_path / name / "all.yaml").write_text(text)
    done = CliRunner().invoke(app, ["k8s", "plan", str(tmp_path / "old"), str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    assert "new cluster:" in done.output
    assert "containers[0].image" in done.output
    assert "beside what runs" in done.output
    same = CliRunner().invoke(app, ["k8s", "plan", str(tmp_path / "old"), str(tmp_path / "old")])
    assert "nothing changes" in same.output


@pytest.mark.parametrize("text", ["- 1\n", "kind: x\n", "a: [\n", ""])
def test_what_is_no_manifest(tmp_path: Path, text: str) -> None:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    with pytest.raises(BadInput):
        read_manifests(file)
    with pytest.raises(NotFound):
        read_manifests(tmp_path / "none")
