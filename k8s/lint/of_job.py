"""The operator's rules about a RayJob: how it ends, is tried again, and cleans up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from k8s.lint.finding import Finding
from k8s.lint.of_cluster import cluster_rules

Tree = Mapping[str, Any]


def job_rules(spec: Tree, where: str, manifest: Tree) -> Iterator[Finding]:
    """What the operator would refuse in the spec of a RayJob at `where`."""
    ends = bool(spec.get("shutdownAfterJobFinishes"))
    mode, retries = spec.get("submissionMode", "K8sJobMode"), int(spec.get("backoffLimit") or 0)
    rules = spec.get("deletionStrategy") or {}
    problems = [
        (
            bool(spec.get("suspend")) and not ends,
            "suspend",
            "what is suspended must be able to go",
            "shutdownAfterJobFinishes: true",
        ),
        (
            int(spec.get("ttlSecondsAfterFinished") or 0) > 0 and not ends,
            "ttlSecondsAfterFinished",
            "nothing goes away after that time",
            "shutdownAfterJobFinishes: true",
        ),
        (
            bool(rules.get("deletionRules")) and ends,
            "deletionStrategy.deletionRules",
            "two ways to clean up",
            "without shutdownAfterJobFinishes",
        ),
        (
            bool(rules.get("deletionRules")) and bool(rules.get("onSuccess") or rules.get("onFailure")),
            "deletionStrategy",
            "rules, and the older way beside them",
            "deletionRules alone",
        ),
        (
            mode == "InteractiveMode" and retries > 0,
            "backoffLimit",
            "an interactive job isn't tried again",
            "0",
        ),
        (
            mode == "SidecarMode" and bool(spec.get("submitterPodTemplate")),
            "submitterPodTemplate",
            "a sidecar has no pod of its own",
            "nothing",
        ),
        (
            mode == "SidecarMode" and bool(spec.get("submitterConfig")),
            "submitterConfig",
            "a sidecar has no pod of its own",
            "nothing",
        ),
    ]
    pod = (((spec.get("rayClusterSpec") or {}).get("headGroupSpec") or {}).get("template") or {}).get("spec")
    if mode == "SidecarMode" and (pod or {}).get("restartPolicy") not in (None, "Never"):
        yield Finding(
            f"{where}.rayClusterSpec.headGroupSpec.template.spec.restartPolicy",
            "a head that starts again would submit its job again",
            str((pod or {})["restartPolicy"]),
            "Never, or nothing",
            "leave it out",
        )
    if not _is_yaml(str(spec.get("runtimeEnvYAML") or "")):
        yield Finding(
            f"{where}.runtimeEnvYAML", "it isn't YAML", "a text that can't be read", "YAML", "mend it"
        )
    selector = spec.get("clusterSelector")
    if selector:
        problems += [
            (
                "ray.io/cluster" not in selector,
                "clusterSelector",
                "no cluster is named",
                "the key ray.io/cluster",
            ),
            (bool(spec.get("suspend")), "suspend", "a cluster of others isn't suspended", "false"),
            (mode == "SidecarMode", "submissionMode", "a cluster of others gets no sidecar", "another mode"),
            (retries > 0, "backoffLimit", "a retry would need a new cluster", "0"),
        ]
    for wrong, field, problem, allowed in problems:
        if wrong:
            yield Finding(
                f"{where}.{field}", problem, str(_at(spec, field)), allowed, "change one of the two"
            )
    for field in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if field in spec and not int(spec[field] or 0) > 0:
            yield Finding(
                f"{where}.{field}", "no time at all", str(spec[field]), "above 0", "raise it, or leave it out"
            )
    yield from _deletion(rules.get("deletionRules") or [], spec, f"{where}.deletionStrategy.deletionRules")
    if spec.get("rayClusterSpec"):
        yield from cluster_rules(
            spec["rayClusterSpec"], f"{where}.rayClusterSpec", manifest, standalone=False
        )


def _deletion(rules: list[Tree], spec: Tree, where: str) -> Iterator[Finding]:
    autoscales = bool((spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling"))
    seen: set[tuple[str, str]] = set()
    waits_s: dict[str, dict[str, int]] = {}
    for number, rule in enumerate(rules):
        condition = rule.get("condition") or {}
        status = str(condition.get("jobStatus") or condition.get("jobDeploymentStatus"))
        policy = str(rule.get("policy"))
        if (status, policy) in seen:
            yield Finding(
                f"{where}[{number}]", "said twice", f"{status}, {policy}", "each pair once", "leave one out"
            )
        seen.add((status, policy))
        waits_s.setdefault(status, {})[policy] = int(condition.get("ttlSeconds") or 0)
        if policy == "DeleteWorkers" and autoscales:
            yield Finding(
                f"{where}[{number}].policy",
                "the autoscaler would start them again",
                policy,
                "DeleteCluster",
                "use it",
            )
        if policy in ("DeleteWorkers", "DeleteCluster") and spec.get("clusterSelector"):
            yield Finding(
                f"{where}[{number}].policy", "the cluster is another's", policy, "DeleteSelf", "use it"
            )
    for status, found in waits_s.items():
        times = [
            found[policy] for policy in ("DeleteWorkers", "DeleteCluster", "DeleteSelf") if policy in found
        ]
        if times != sorted(times):
            yield Finding(
                where,
                f"after {status}, the larger goes before the smaller",
                ", ".join(f"{policy} after {time} s" for policy, time in found.items()),
                "workers, then the cluster, then the job",
                "order their times",
            )


def _is_yaml(text: str) -> bool:
    try:
        yaml.safe_load(text)
    except yaml.YAMLError:
        return False
    return True


def _at(spec: Tree, field: str) -> Any:
    found: Any = spec
    for key in field.split("."):
        found = (found or {}).get(key)
    return found
