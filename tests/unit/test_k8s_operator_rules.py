"""What the operator refuses is refused here, each with a message of its own; what is harmless is not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from k8s.lint.operator import refused
from k8s.render import render_recipe, render_service
from k8s.settings import ClusterSettings
from serving.service import Service
from training.recipe import Recipe

Tree = dict[str, Any]
Edit = Callable[[Tree], object]

SERVICE = Service.model_validate(
    {"store": "s3://b/store", "models": [{"model": "digits@live", "replicas": {"min": 1, "max": 4}}]}
)
RECIPE = Recipe.model_validate(
    {
        "model": "digits",
        "task": "image-classification",
        "data": {"train": "s3://b/train", "eval": "s3://b/eval"},
        "store": "s3://b/store",
    }
)
SERVED = next(m for m in render_service(SERVICE, ClusterSettings()) if m["kind"] == "RayService")
JOB = next(m for m in render_recipe(RECIPE, ClusterSettings(), "run") if m["kind"] == "RayJob")


def cluster(tree: Tree) -> Tree:
    found: Tree = tree["spec"].get("rayClusterConfig") or tree["spec"]["rayClusterSpec"]
    return found


def head(tree: Tree) -> Tree:
    found: Tree = cluster(tree)["headGroupSpec"]
    return found


def group(tree: Tree) -> Tree:
    found: Tree = cluster(tree)["workerGroupSpecs"][0]
    return found


def env(part: Tree, name: str, value: str = "1") -> None:
    part["template"]["spec"]["containers"][0]["env"].append({"name": name, "value": value})


def incremental(tree: Tree, **options: Any) -> None:
    good = {"maxSurgePercent": 50, "stepSizePercent": 10, "intervalSeconds": 30, "gatewayClassName": "istio"}
    tree["spec"]["upgradeStrategy"] = {
        "type": "NewClusterWithIncrementalUpgrade",
        "clusterUpgradeOptions": {**good, **options},
    }


def rules(tree: Tree, *found: tuple[str, str, int], **more: Any) -> None:
    tree["spec"].pop("shutdownAfterJobFinishes", None)
    tree["spec"].pop("ttlSecondsAfterFinished", None)
    tree["spec"]["deletionStrategy"] = {
        "deletionRules": [
            {"policy": policy, "condition": {"jobStatus": status, "ttlSeconds": seconds}}
            for status, policy, seconds in found
        ],
        **more,
    }


BROKEN: dict[str, tuple[Tree, Edit, str]] = {
    "a long name": (SERVED, lambda t: t["metadata"].update(name="a" * 48), "too long"),
    "a name with a digit first": (SERVED, lambda t: t["metadata"].update(name="1a"), "can't be a host's"),
    "a job's long name": (JOB, lambda t: t["metadata"].update(name="a" * 48), "too long"),
    "no container": (SERVED, lambda t: group(t)["template"]["spec"].update(containers=[]), "no container"),
    "resources twice": (
        SERVED,
        lambda t: group(t).update(resources={"CPU": "2"}, rayStartParams={"num-cpus": "2"}),
        "said twice",
    ),
    "labels as a parameter": (SERVED, lambda t: group(t)["rayStartParams"].update(labels="a=b"), "labels"),
    "negative": (SERVED, lambda t: group(t).update(minReplicas=-1), "negative"),
    "more than most": (SERVED, lambda t: group(t).update(minReplicas=9), "more pods at least"),
    "idle time on version 1": (
        SERVED,
        lambda t: (group(t).update(idleTimeoutSeconds=5), cluster(t)["autoscalerOptions"].pop("version")),
        "only version 2",
    ),
    "a priority on an old Ray": (
        SERVED,
        lambda t: (group(t).update(priority=1), cluster(t).update(rayVersion="2.55.0")),
        "no priorities",
    ),
    "suspended beside the autoscaler": (
        SERVED,
        lambda t: group(t).update(suspend=True),
        "autoscaler would start",
    ),
    "version 2 without the autoscaler": (
        SERVED,
        lambda t: (
            env(head(t), "RAY_enable_autoscaler_v2"),
            cluster(t).update(enableInTreeAutoscaling=False),
        ),
        "there is no autoscaler",
    ),
    "the operator's variable": (
        SERVED,
        lambda t: cluster(t)["autoscalerOptions"]["env"].append({"name": "KUBERAY_GEN_AUTOSCALER_START_CMD"}),
        "the operator sets",
    ),
    "Redis in the environment": (SERVED, lambda t: env(head(t), "RAY_REDIS_ADDRESS"), "environment alone"),
    "Redis twice": (
        SERVED,
        lambda t: (
            cluster(t).update(gcsFaultToleranceOptions={"redisAddress": "r:1"}),
            env(head(t), "REDIS_PASSWORD"),
        ),
        "said twice",
    ),
    "Redis and an annotation": (
        SERVED,
        lambda t: (
            cluster(t).update(gcsFaultToleranceOptions={"redisAddress": "r:1"}),
            t["metadata"].setdefault("annotations", {}).update({"ray.io/ft-enabled": "true"}),
        ),
        "said twice",
    ),
    "two backends": (
        SERVED,
        lambda t: cluster(t).update(gcsFaultToleranceOptions={"backend": "rocksdb", "redisAddress": "r:1"}),
        "two backends",
    ),
    "storage without rocksdb": (
        SERVED,
        lambda t: cluster(t).update(
            gcsFaultToleranceOptions={"redisAddress": "r:1", "storage": {"size": "1Gi"}}
        ),
        "only rocksdb",
    ),
    "a token without a version": (SERVED, lambda t: cluster(t).pop("rayVersion"), "can't ask for a token"),
    "a token on an old Ray": (
        SERVED,
        lambda t: cluster(t).update(rayVersion="2.51.0"),
        "can't ask for a token",
    ),
    "Kubernetes' tokens": (
        SERVED,
        lambda t: cluster(t)["authOptions"].update(enableK8sTokenAuth=True),
        "can't be used here",
    ),
    "a strategy in the wrong place": (
        SERVED,
        lambda t: cluster(t).update(upgradeStrategy={"type": "Recreate"}),
        "upgraded by its owner",
    ),
    "a name for the head's service": (
        SERVED,
        lambda t: head(t).update(headService={"metadata": {"name": "a"}}),
        "would share the name",
    ),
    "no such strategy": (
        SERVED,
        lambda t: t["spec"].update(upgradeStrategy={"type": "Blue"}),
        "no such strategy",
    ),
    "an increment without the autoscaler": (
        SERVED,
        lambda t: (incremental(t), cluster(t).update(enableInTreeAutoscaling=False)),
        "scales both clusters",
    ),
    "a step above the surge": (SERVED, lambda t: incremental(t, stepSizePercent=60), "don't fit"),
    "no step": (SERVED, lambda t: incremental(t, stepSizePercent=None), "don't fit"),
    "no interval": (SERVED, lambda t: incremental(t, intervalSeconds=0), "no time between"),
    "no gateway": (SERVED, lambda t: incremental(t, gatewayClassName=""), "no gateway"),
    "no duration": (
        SERVED,
        lambda t: t["metadata"].setdefault("annotations", {}).update({"ray.io/initializing-timeout": "soon"}),
        "no duration",
    ),
    "suspended for ever": (
        JOB,
        lambda t: t["spec"].update(suspend=True, shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0),
        "must be able to go",
    ),
    "a time after which nothing goes": (
        JOB,
        lambda t: t["spec"].update(shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=60),
        "nothing goes away",
    ),
    "two ways to clean up": (
        JOB,
        lambda t: (
            rules(t, ("SUCCEEDED", "DeleteCluster", 1)),
            t["spec"].update(shutdownAfterJobFinishes=True),
        ),
        "two ways",
    ),
    "the older way besides": (
        JOB,
        lambda t: rules(t, ("SUCCEEDED", "DeleteCluster", 1), onSuccess={"policy": "DeleteCluster"}),
        "the older way",
    ),
    "a rule twice": (
        JOB,
        lambda t: rules(t, ("FAILED", "DeleteSelf", 1), ("FAILED", "DeleteSelf", 2)),
        "said twice",
    ),
    "the larger first": (
        JOB,
        lambda t: rules(t, ("FAILED", "DeleteCluster", 9), ("FAILED", "DeleteSelf", 2)),
        "the larger goes",
    ),
    "workers that come back": (
        JOB,
        lambda t: (
            rules(t, ("FAILED", "DeleteWorkers", 1)),
            cluster(t).update(enableInTreeAutoscaling=True, autoscalerOptions={"version": "v2"}),
        ),
        "start them again",
    ),
    "retries by hand": (
        JOB,
        lambda t: t["spec"].update(submissionMode="InteractiveMode"),
        "isn't tried again",
    ),
    "a sidecar's pod": (JOB, lambda t: t["spec"].update(submissionMode="SidecarMode"), "no pod of its own"),
    "a selector without a cluster": (
        JOB,
        lambda t: t["spec"].update(clusterSelector={"a": "b"}),
        "no cluster",
    ),
    "a selector and retries": (
        JOB,
        lambda t: t["spec"].update(clusterSelector={"ray.io/cluster": "c"}),
        "a retry would need",
    ),
    "no time at all": (JOB, lambda t: t["spec"].update(activeDeadlineSeconds=0), "no time at all"),
}
HARMLESS: dict[str, tuple[Tree, Edit]] = {
    "as rendered": (SERVED, lambda t: None),
    "a job as rendered": (JOB, lambda t: None),
    "a label": (SERVED, lambda t: t["metadata"]["labels"].update(team="vision")),
    "the longest name": (SERVED, lambda t: t["metadata"].update(name="a" * 47)),
    "a variable": (SERVED, lambda t: env(head(t), "A")),
    "bounds": (SERVED, lambda t: group(t).update(minReplicas=2, maxReplicas=2)),
    "an idle time": (SERVED, lambda t: group(t).update(idleTimeoutSeconds=5)),
    "a priority": (SERVED, lambda t: group(t).update(priority=3)),
    "increments": (SERVED, incremental),
    "a duration": (
        SERVED,
        lambda t: t["metadata"].setdefault("annotations", {}).update({"ray.io/initializing-timeout": "10m"}),
    ),
    "Redis": (SERVED, lambda t: cluster(t).update(gcsFaultToleranceOptions={"redisAddress": "r:1"})),
    "rules in order": (
        JOB,
        lambda t: rules(t, ("FAILED", "DeleteCluster", 2), ("FAILED", "DeleteSelf", 9)),
    ),
    "suspended": (JOB, lambda t: t["spec"].update(suspend=True)),
}


def findings(tree: Tree, edit: Edit) -> list[str]:
    changed = copy.deepcopy(tree)
    edit(changed)
    return [str(one) for one in refused(changed)]


@pytest.mark.parametrize(("tree", "edit", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_what_the_operator_refuses(tree: Tree, edit: Edit, message: str) -> None:
    found = findings(tree, edit)
    assert any(message in one for one in found), found


@pytest.mark.parametrize(("tree", "edit"), HARMLESS.values(), ids=HARMLESS.keys())
def test_what_is_harmless(tree: Tree, edit: Edit) -> None:
    assert findings(tree, edit) == []
