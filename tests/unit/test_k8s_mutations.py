"""Two hundred seeded mutations of good manifests: what breaks a rule is told by it, nothing else is.

A mutation picks its place by chance: which manifests, which group or container, which value. A failure names
its seed.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import yaml
from kuberay_crds import EXAMPLES, crds

from cluster.config import load_yaml
from k8s.lint.layers import lint
from k8s.render import render
from k8s.settings import ClusterSettings
from k8s.yamltext import to_yaml

Tree = dict[str, Any]
Chance = random.Random
Mutation = Callable[["Bundle", Chance], object]

MUTATIONS = 200
CRON = {"schedule": {"cron": "@daily", "by": "RayCronJob", "concurrency": "Allow"}}
KEPT = {"job": {"cleanup": {"succeeded": {"record_s": 60}, "failed": {"record_s": 4000}}}}
SOURCES: dict[str, tuple[str, Tree]] = {
    "service": ("service.yaml", {}),
    "redis": ("service.yaml", {"redis": {"address": "redis:6379"}, "serving": {"old_cluster_s": 5}}),
    "gateway": ("service.yaml", {"serving": {"gateway": {"class": "istio"}}, "gpu_idle_timeout_s": 90}),
    "job": ("recipe.yaml", {}),
    "staged": ("recipe.yaml", KEPT),
    "scheduled": ("recipe.yaml", {"schedule": {"cron": "0 3 * * 1-5"}}),
    "cron": ("recipe.yaml", {**CRON, **KEPT}),
}
SERVICES, JOBS = ("service", "redis", "gateway"), ("job", "staged")
WITH_CLUSTER = (*SERVICES, *JOBS, "cron")


class Bundle:
    """A copy of rendered manifests, with the places that mutations aim at."""

    def __init__(self, source: str) -> None:
        self.objects = copy.deepcopy(rendered(source))

    @property
    def main(self) -> Tree:
        return self.objects[-1]

    @property
    def spec(self) -> Tree:
        found: Tree = self.main["spec"]
        return found["jobTemplate"] if self.main["kind"] == "RayCronJob" else found

    @property
    def cluster(self) -> Tree:
        found: Tree = self.spec.get("rayClusterConfig") or self.spec["rayClusterSpec"]
        return found

    @property
    def head(self) -> Tree:
        found: Tree = self.cluster["headGroupSpec"]
        return found

    def group(self, chance: Chance) -> Tree:
        found: Tree = chance.choice(self.cluster["workerGroupSpecs"])
        return found

    def pod(self, chance: Chance) -> Tree:
        """Any pod's spec: the head's, a group's, a submitter's, a launcher's."""
        if self.main["kind"] == "CronJob":
            found: Tree = self.spec["jobTemplate"]["spec"]["template"]["spec"]
            return found
        templates = [self.head["template"], *(g["template"] for g in self.cluster["workerGroupSpecs"])]
        if "submitterPodTemplate" in self.spec:
            templates.append(self.spec["submitterPodTemplate"])
        found = chance.choice(templates)["spec"]
        return found

    def container(self, chance: Chance) -> Tree:
        found: Tree = self.pod(chance)["containers"][0]
        return found

    def env(self, group: Tree, name: str) -> None:
        group["template"]["spec"]["containers"][0]["env"].append({"name": name, "value": "1"})

    def annotate(self, **annotations: str) -> None:
        self.main["metadata"].setdefault("annotations", {}).update(annotations)

    def served(self, edit: Callable[[Tree], object]) -> None:
        config = yaml.safe_load(self.spec["serveConfigV2"])
        for application in config["applications"]:
            edit(application["args"]["service"])
        self.spec["serveConfigV2"] = to_yaml(config)

    def upgrade(self, **options: Any) -> None:
        self.spec["upgradeStrategy"]["clusterUpgradeOptions"].update(options)

    def rule(self, policy: str, after_s: int, **when: str) -> None:
        rules = self.spec["deletionStrategy"]["deletionRules"]
        rules.append({"policy": policy, "condition": {**when, "ttlSeconds": after_s}})

    def add(self, kind: str, spec: Tree) -> None:
        metadata = {"name": "more", "namespace": self.main["metadata"]["namespace"]}
        self.objects.append({"apiVersion": "v1", "kind": kind, "metadata": metadata, "spec": spec})


@functools.cache
def rendered(source: str) -> list[Tree]:
    file, options = SOURCES[source]
    base = load_yaml(ClusterSettings, EXAMPLES / "settings.yaml").model_dump(exclude_defaults=True)
    base.pop("redis")
    return render(EXAMPLES / file, ClusterSettings.model_validate({**base, **options}))


def resources_twice(b: Bundle, c: Chance) -> None:
    key = c.choice(("num-cpus", "num-gpus", "memory"))
    b.group(c).update(resources={"CPU": "2"}, rayStartParams={key: "2"})


def without_context(b: Bundle, c: Chance, field: str) -> None:
    pod = b.pod(c)
    pod["containers"][0]["securityContext"].pop(field)
    pod["securityContext"].pop(field)


def storage(b: Bundle, **options: Any) -> None:
    b.cluster["gcsFaultToleranceOptions"] = {"backend": "rocksdb", **options}


def network(b: Bundle, mode: str, field: str, part: str = "head") -> None:
    b.cluster["networkPolicy"] = {"mode": mode, part: {field: [{}]}}


# By what is told: where it applies, and what to do.
BREAKING: Mapping[str, tuple[tuple[str, ...], Mutation]] = {
    "too long": (WITH_CLUSTER, lambda b, c: b.main["metadata"].update(name="a" * c.randrange(48, 60))),
    "can't be a host's": (
        WITH_CLUSTER,
        lambda b, c: b.main["metadata"].update(name=c.choice(["1a", "a_b", "A", "a-", "ä"])),
    ),
    "no container": (WITH_CLUSTER, lambda b, c: b.group(c)["template"]["spec"].update(containers=[])),
    "resources are said twice": (WITH_CLUSTER, resources_twice),
    "labels of nodes have a field": (
        WITH_CLUSTER,
        lambda b, c: b.group(c)["rayStartParams"].update(labels="a=b"),
    ),
    "a negative number": (WITH_CLUSTER, lambda b, c: b.group(c).update(minReplicas=-c.randrange(1, 9))),
    "more pods at least": (
        WITH_CLUSTER,
        lambda b, c: b.group(c).update(minReplicas=c.randrange(20, 30), maxReplicas=19),
    ),
    "only version 2 of the autoscaler": (
        WITH_CLUSTER,
        lambda b, c: (
            b.group(c).update({c.choice(("idleTimeoutSeconds", "priority")): 5}),
            b.cluster["autoscalerOptions"].pop("version"),
        ),
    ),
    "this Ray has no priorities": (
        WITH_CLUSTER,
        lambda b, c: (b.group(c).update(priority=1), b.cluster.update(rayVersion="2.55.1")),
    ),
    "the autoscaler would start what is suspended": (
        WITH_CLUSTER,
        lambda b, c: b.group(c).update(suspend=True),
    ),
    "there is no autoscaler": (
        WITH_CLUSTER,
        lambda b, c: (
            b.env(b.head, "RAY_enable_autoscaler_v2"),
            b.cluster.update(enableInTreeAutoscaling=False),
        ),
    ),
    "the operator sets this variable": (
        WITH_CLUSTER,
        lambda b, c: b.cluster["autoscalerOptions"]["env"].append(
            {"name": "KUBERAY_GEN_AUTOSCALER_START_CMD"}
        ),
    ),
    "in the head's environment alone": (
        ("service", "job", "cron"),
        lambda b, c: b.env(b.head, "RAY_REDIS_ADDRESS"),
    ),
    "where the head keeps its state is said twice": (
        ("redis",),
        lambda b, c: c.choice(
            [
                lambda: b.env(b.head, "REDIS_PASSWORD"),
                lambda: b.head["rayStartParams"].update({"redis-password": "x"}),
                lambda: b.annotate(**{"ray.io/ft-enabled": "true"}),
                lambda: b.annotate(**{"ray.io/external-storage-namespace": "x"}),
            ]
        )(),
    ),
    "two backends": (WITH_CLUSTER, lambda b, c: storage(b, redisAddress="r:1")),
    "only rocksdb has storage": (
        ("redis",),
        lambda b, c: b.cluster["gcsFaultToleranceOptions"].update(storage={"size": "1Gi"}),
    ),
    "a claim that exists has these": (
        WITH_CLUSTER,
        lambda b, c: storage(b, storage={"claimName": "a", c.choice(("size", "storageClassName")): "1Gi"}),
    ),
    "this Ray can't ask for a token": (
        WITH_CLUSTER,
        lambda b, c: b.cluster.update(rayVersion=c.choice(["2.51.0", "1.9", ""])),
    ),
    "Kubernetes' tokens can't be used here": (
        WITH_CLUSTER,
        lambda b, c: b.cluster["authOptions"].update(enableK8sTokenAuth=True),
    ),
    "is upgraded by its owner": (
        WITH_CLUSTER,
        lambda b, c: b.cluster.update(upgradeStrategy={"type": c.choice(("Recreate", "None"))}),
    ),
    "rules for what the mode leaves open": (
        WITH_CLUSTER,
        lambda b, c: network(
            b, *c.choice([("DenyAllEgress", "ingressRules"), ("DenyAllIngress", "egressRules")])
        ),
    ),
    "rules for a group that isn't there": (
        WITH_CLUSTER,
        lambda b, c: b.cluster.update(networkPolicy={"workerGroups": [{"groupName": "nobody"}]}),
    ),
    "no name of a group": (
        WITH_CLUSTER,
        lambda b, c: b.cluster.update(networkPolicy={"workerGroups": [{"groupName": "No_Name"}]}),
    ),
    "TLS is said twice": (
        WITH_CLUSTER,
        lambda b, c: (
            b.cluster.update(tlsOptions={"enabled": True}),
            b.env(c.choice([b.head, b.group(c)]), c.choice(["RAY_USE_TLS", "RAY_TLS_CA_CERT"])),
        ),
    ),
    "nowhere to write the history": (
        WITH_CLUSTER,
        lambda b, c: b.cluster.update(historyServerOptions={"collectorOptions": {"image": "h:1"}}),
    ),
    "two clusters of one service would share": (
        SERVICES,
        lambda b, c: b.head.update(headService={"metadata": {"name": "a"}}),
    ),
    "no such strategy": (SERVICES, lambda b, c: b.spec.update(upgradeStrategy={"type": "BlueGreen"})),
    "an incremental upgrade scales both": (
        ("gateway",),
        lambda b, c: b.cluster.update(enableInTreeAutoscaling=False),
    ),
    "steps and surge don't fit": (
        ("gateway",),
        lambda b, c: b.upgrade(**c.choice([{"stepSizePercent": 60}, {"maxSurgePercent": 101}])),
    ),
    "no time between steps": (("gateway",), lambda b, c: b.upgrade(intervalSeconds=-c.randrange(2))),
    "no gateway to move": (("gateway",), lambda b, c: b.upgrade(gatewayClassName="")),
    "is no duration": (
        SERVICES,
        lambda b, c: b.annotate(**{"ray.io/initializing-timeout": c.choice(["soon", "0", "-5m", ""])}),
    ),
    "what is suspended must be able": (("staged", "cron"), lambda b, c: b.spec.update(suspend=True)),
    "nothing goes away after": (
        ("staged", "cron"),
        lambda b, c: b.spec.update(ttlSecondsAfterFinished=c.randrange(1, 99)),
    ),
    "two ways to clean up": (
        ("staged", "cron"),
        lambda b, c: b.spec.update(shutdownAfterJobFinishes=True),
    ),
    "and the older way beside": (
        ("staged", "cron"),
        lambda b, c: b.spec["deletionStrategy"].update(onSuccess={"policy": "DeleteCluster"}),
    ),
    "]: said twice": (("staged", "cron"), lambda b, c: b.rule("DeleteSelf", 9999, jobStatus="SUCCEEDED")),
    "the larger goes before": (
        ("staged", "cron"),
        lambda b, c: b.spec["deletionStrategy"]["deletionRules"][0]["condition"].update(ttlSeconds=9999),
    ),
    "would start them again": (
        ("staged", "cron"),
        lambda b, c: b.rule("DeleteWorkers", 0, jobStatus="FAILED"),
    ),
    "an interactive job isn't tried": (JOBS, lambda b, c: b.spec.update(submissionMode="InteractiveMode")),
    "a sidecar has no pod": (JOBS, lambda b, c: b.spec.update(submissionMode="SidecarMode")),
    "a head that starts again": (
        JOBS,
        lambda b, c: (
            b.spec.update(submissionMode="SidecarMode"),
            b.head["template"]["spec"].update(restartPolicy=c.choice(("Always", "OnFailure"))),
        ),
    ),
    "no cluster is named": (JOBS, lambda b, c: b.spec.update(clusterSelector={"a": "b"})),
    "a retry would need": (JOBS, lambda b, c: b.spec.update(clusterSelector={"ray.io/cluster": "c"})),
    "no time at all": (
        JOBS,
        lambda b, c: b.spec.update(
            {c.choice(("activeDeadlineSeconds", "preRunningDeadlineSeconds")): -c.randrange(2)}
        ),
    ),
    "runtimeEnvYAML: it isn't YAML": (JOBS, lambda b, c: b.spec.update(runtimeEnvYAML="a: [")),
    "no cron expression": (
        ("cron",),
        lambda b, c: b.main["spec"].update(schedule=c.choice(["every day", "61 * * * *", "* * * *"])),
    ),
    "no such time zone": (("cron",), lambda b, c: b.main["spec"].update(timeZone="Mars/Base")),
    "the node's own namespace": (
        (*WITH_CLUSTER, "scheduled"),
        lambda b, c: b.pod(c).update({c.choice(("hostNetwork", "hostPID", "hostIPC")): True}),
    ),
    "a volume of the node": (
        (*WITH_CLUSTER, "scheduled"),
        lambda b, c: b.pod(c)["volumes"].append({"name": "h", "hostPath": {"path": "/"}}),
    ),
    "a kernel setting": (
        (*WITH_CLUSTER, "scheduled"),
        lambda b, c: b.pod(c)["securityContext"].update(sysctls=[{"name": "kernel.msgmax", "value": "1"}]),
    ),
    "a container with all rights": (
        (*WITH_CLUSTER, "scheduled"),
        lambda b, c: b.container(c)["securityContext"].update(privileged=True),
    ),
    "rights may be gained": (
        (*WITH_CLUSTER, "scheduled"),
        lambda b, c: b.container(c)["securityContext"].update(allowPrivilegeEscalation=True),
    ),
    "capabilities are kept": (
        (*WITH_CLUSTER, "scheduled"),
        lambda b, c: b.container(c)["securityContext"].update(capabilities={"drop": ["NET_RAW"]}),
    ),
    "capabilities are added": (
        (*WITH_CLUSTER, "scheduled"),
        lambda b, c: b.container(c)["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
    ),
    "it may run as root": (
        (*WITH_CLUSTER, "scheduled"),
        lambda b, c: without_context(b, c, "runAsNonRoot"),
    ),
    "it runs as root": (
        (*WITH_CLUSTER, "scheduled"),
        lambda b, c: b.pod(c)["securityContext"].update(runAsUser=0),
    ),
    "system calls aren't filtered": (
        (*WITH_CLUSTER, "scheduled"),
        lambda b, c: without_context(b, c, "seccompProfile"),
    ),
    "a port of the node": (
        SERVICES,
        lambda b, c: b.container(c)["ports"].append({"containerPort": 1, "hostPort": 1}),
    ),
    "autoscaler (added by the operator": (
        WITH_CLUSTER,
        lambda b, c: b.cluster["autoscalerOptions"].pop("securityContext"),
    ),
    "wait-gcs-ready (added by the operator": (
        WITH_CLUSTER,
        lambda b, c: b.group(c)["template"]["spec"]["containers"][0].pop("securityContext"),
    ),
    "submitterPodTemplate.spec.containers[ray-job-submitter]": (
        (*JOBS, "cron"),
        lambda b, c: b.spec.pop("submitterPodTemplate"),
    ),
    "ray-job-submitter (added by the operator": (
        JOBS,
        lambda b, c: (b.spec.pop("submitterPodTemplate"), b.spec.update(submissionMode="SidecarMode")),
    ),
    "ask for more GPUs than all pods": (
        SERVICES,
        lambda b, c: b.cluster["workerGroupSpecs"][1].update(maxReplicas=1),
    ),
    "ask for more CPUs than all pods": (
        SERVICES,
        lambda b, c: [group.update(maxReplicas=1) for group in b.cluster["workerGroupSpecs"]],
    ),
    "killed while its replicas still drain": (
        SERVICES,
        lambda b, c: b.group(c)["template"]["spec"].update(terminationGracePeriodSeconds=c.randrange(20)),
    ),
    "a full batch never forms": (
        SERVICES,
        lambda b, c: b.served(lambda s: c.choice(s["models"]).update(max_batch_size=c.randrange(2000, 9000))),
    ),
    "may be cut off by a drain": (
        SERVICES,
        lambda b, c: b.served(lambda s: c.choice(s["models"]).update(slo_ms=c.randrange(21_000, 90_000))),
    ),
    "more CPUs than the quota": (
        (*WITH_CLUSTER, "scheduled"),
        lambda b, c: b.add("ResourceQuota", {"hard": {"limits.cpu": str(c.randrange(1, 5))}}),
    ),
    "more GPUs than the quota": (
        (*WITH_CLUSTER, "scheduled"),
        lambda b, c: b.add("ResourceQuota", {"hard": {"requests.nvidia.com/gpu": "1"}}),
    ),
    "typo: unknown field": (
        WITH_CLUSTER,
        lambda b, c: c.choice([b.spec, b.cluster, b.head, b.group(c), b.pod(c)]).update(typo=1),
    ),
}

HARMLESS: Mapping[str, tuple[tuple[str, ...], Mutation]] = {
    "a label": (tuple(SOURCES), lambda b, c: b.main["metadata"]["labels"].update(team="vision")),
    "an annotation": (tuple(SOURCES), lambda b, c: b.annotate(note=str(c.random()))),
    "the longest name": (SERVICES, lambda b, c: b.main["metadata"].update(name="a" * 47)),
    "a variable": (WITH_CLUSTER, lambda b, c: b.env(c.choice([b.head, b.group(c)]), "FURTHER")),
    "an image": (tuple(SOURCES), lambda b, c: b.container(c).update(image=f"other:{c.randrange(9)}")),
    "more pods": (
        WITH_CLUSTER,
        lambda b, c: [
            group.update(maxReplicas=c.randrange(8, 99)) for group in b.cluster["workerGroupSpecs"]
        ],
    ),
    "an idle time": (WITH_CLUSTER, lambda b, c: b.group(c).update(idleTimeoutSeconds=c.randrange(1, 999))),
    "a priority": (WITH_CLUSTER, lambda b, c: b.group(c).update(priority=c.randrange(1, 9))),
    "a longer grace": (
        SERVICES,
        lambda b, c: b.group(c)["template"]["spec"].update(terminationGracePeriodSeconds=c.randrange(20, 99)),
    ),
    "a duration": (
        SERVICES,
        lambda b, c: b.annotate(**{"ray.io/initializing-timeout": c.choice(["10m", "90", "1h5m", "1.5h"])}),
    ),
    "steps that fit": (
        ("gateway",),
        lambda b, c: b.upgrade(stepSizePercent=c.randrange(1, 51), intervalSeconds=c.randrange(1, 999)),
    ),
    "no upgrades": (SERVICES, lambda b, c: b.spec.update(upgradeStrategy={"type": "None"})),
    "suspended": (("job",), lambda b, c: b.spec.update(suspend=True)),
    "a deadline": (JOBS, lambda b, c: b.spec.update(activeDeadlineSeconds=c.randrange(1, 9999))),
    "retries": (JOBS, lambda b, c: b.spec.update(backoffLimit=c.randrange(9))),
    "an environment": (JOBS, lambda b, c: b.spec.update(runtimeEnvYAML="env_vars: {A: '1'}\n")),
    "another rule": (("staged",), lambda b, c: b.rule("DeleteNone", 0, jobStatus="FAILED")),
    "a volume": (tuple(SOURCES), lambda b, c: b.pod(c)["volumes"].append({"name": "v", "emptyDir": {}})),
    "a safe kernel setting": (
        tuple(SOURCES),
        lambda b, c: b.pod(c)["securityContext"].update(
            sysctls=[{"name": "net.ipv4.tcp_syncookies", "value": "1"}]
        ),
    ),
    "another user": (
        tuple(SOURCES),
        lambda b, c: b.pod(c)["securityContext"].update(runAsUser=c.randrange(1, 60_000)),
    ),
    "a port allowed": (
        tuple(SOURCES),
        lambda b, c: b.container(c)["securityContext"]["capabilities"].update(add=["NET_BIND_SERVICE"]),
    ),
    "a wide quota": (tuple(SOURCES), lambda b, c: b.add("ResourceQuota", {"hard": {"limits.cpu": "900"}})),
    "a quota elsewhere": (
        tuple(SOURCES),
        lambda b, c: (
            b.add("ResourceQuota", {"hard": {"limits.cpu": "1"}}),
            b.objects[-1]["metadata"].update(namespace="other"),
        ),
    ),
    "a smaller batch": (
        SERVICES,
        lambda b, c: b.served(lambda s: c.choice(s["models"]).update(max_batch_size=c.randrange(1, 64))),
    ),
    "another time": (("cron",), lambda b, c: b.main["spec"].update(schedule=f"{c.randrange(60)} 3 * * *")),
    "another order": (WITH_CLUSTER, lambda b, c: b.cluster["workerGroupSpecs"].reverse()),
    "rules of the network": (WITH_CLUSTER, lambda b, c: network(b, "DenyAll", "ingressRules")),
    "a claim": (
        ("service", "gateway"),
        lambda b, c: storage(b, storage={"claimName": "a"}),
    ),
}


def told(bundle: Bundle) -> list[str]:
    return [str(one) for one in lint(bundle.objects, crds()).findings]


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_mutated_is_good_before(source: str) -> None:
    assert told(Bundle(source)) == []


def drawn() -> list[tuple[int, str, str]]:
    """Seed, kind and name of each mutation: every rule at least once, the rest by chance."""
    chance = random.Random(20_261_124)
    names = [("breaking", name) for name in BREAKING] + [("harmless", name) for name in HARMLESS]
    names += chance.choices(names, k=MUTATIONS - len(names))
    return [(seed, kind, name) for seed, (kind, name) in enumerate(names)]


@pytest.mark.parametrize(("seed", "kind", "name"), drawn(), ids=lambda value: str(value)[:40])
def test_mutations(seed: int, kind: str, name: str) -> None:
    chance = random.Random(seed)
    sources, mutate = (BREAKING if kind == "breaking" else HARMLESS)[name]
    bundle = Bundle(chance.choice(sources))
    mutate(bundle, chance)
    found = told(bundle)
    if kind == "harmless":
        assert found == []
    else:
        assert any(name in one for one in found), found
