"""The pods of an object as they will run: what is written, and what the operator (1.7) puts in besides.

Read in `common/pod.go`, `common/job.go` and `rayjob_controller.go`, and restated:

- beside the head, where the cluster scales itself, `autoscaler`: no security context but that of
  `autoscalerOptions`, which takes its place whole;
- before each worker, `wait-gcs-ready`: image, variables, mounts and security context of the Ray container;
- for a RayJob in K8sJobMode a pod of its own, as `submitterPodTemplate` says, else one without any security
  context; in SidecarMode a container beside the head, again without any, which nothing can set.

The job that clears Redis after a cluster is the head's pod with its Ray container alone, so whatever holds
for the head holds for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Tree = Mapping[str, Any]

_CLUSTER = {"RayService": "rayClusterConfig", "RayJob": "rayClusterSpec"}
_TEMPLATED = ("Deployment", "StatefulSet", "DaemonSet", "Job")
_SUBMITTER = "ray-job-submitter"


def pods(manifest: Tree) -> Iterator[tuple[str, Tree]]:
    """Each pod's spec with its path."""
    kind, spec = str(manifest.get("kind")), manifest.get("spec") or {}
    where = f"{kind}/{(manifest.get('metadata') or {}).get('name')}.spec"
    if kind == "RayCluster":
        yield from _of_cluster(spec, where, [])
    elif kind == "RayService":
        yield from _of_cluster(spec.get("rayClusterConfig") or {}, f"{where}.rayClusterConfig", [])
    elif kind == "RayJob":
        yield from _of_job(spec, where)
    elif kind == "RayCronJob":
        yield from _of_job(spec.get("jobTemplate") or {}, f"{where}.jobTemplate")
    elif kind == "Pod":
        yield where, spec
    elif kind in _TEMPLATED:
        yield f"{where}.template.spec", _pod_of(spec)
    elif kind == "CronJob":
        job = (spec.get("jobTemplate") or {}).get("spec") or {}
        yield f"{where}.jobTemplate.spec.template.spec", _pod_of(job)


def _of_job(spec: Tree, where: str) -> Iterator[tuple[str, Tree]]:
    mode = spec.get("submissionMode", "K8sJobMode")
    beside: list[Tree] = []
    if mode == "SidecarMode":
        beside.append(_added(_SUBMITTER, "submissionMode SidecarMode", {}))
    if spec.get("rayClusterSpec"):
        yield from _of_cluster(spec["rayClusterSpec"], f"{where}.rayClusterSpec", beside)
    if mode == "K8sJobMode":
        template = spec.get("submitterPodTemplate")
        pod = _pod_of({"template": template}) if template else {"containers": [{"name": _SUBMITTER}]}
        yield f"{where}.submitterPodTemplate.spec", pod


def _of_cluster(cluster: Tree, where: str, beside: list[Tree]) -> Iterator[tuple[str, Tree]]:
    head = _pod_of(cluster.get("headGroupSpec") or {})
    if cluster.get("enableInTreeAutoscaling"):
        context = (cluster.get("autoscalerOptions") or {}).get("securityContext") or {}
        beside = [_added("autoscaler", "autoscalerOptions.securityContext", context), *beside]
    containers = [*(head.get("containers") or []), *beside]
    yield f"{where}.headGroupSpec.template.spec", {**head, "containers": containers}
    for number, group in enumerate(cluster.get("workerGroupSpecs") or []):
        yield f"{where}.workerGroupSpecs[{number}].template.spec", _worker(_pod_of(group))


def _worker(pod: Tree) -> Tree:
    containers = pod.get("containers") or []
    if not containers:
        return pod
    waits = _added("wait-gcs-ready", "as the Ray container", containers[0].get("securityContext") or {})
    return {**pod, "initContainers": [*(pod.get("initContainers") or []), waits]}


def _added(name: str, said_by: str, context: Tree) -> Tree:
    return {"name": f"{name} (added by the operator: {said_by})", "securityContext": context}


def _pod_of(owner: Tree) -> Tree:
    found: Tree = (owner.get("template") or {}).get("spec") or {}
    return found
