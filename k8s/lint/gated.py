"""Fields that the operator (1.7) reads only behind a feature gate, and its rules about them.

Which gates a cluster's operator has on can't be seen from manifests: `gates` names those that are needed, for
a person to check. A field whose gate is off is refused by the operator, or silently passed over.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from k8s.lint.finding import Finding

Tree = Mapping[str, Any]

_DNS_1123 = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_TLS_ENV = re.compile(r"RAY_USE_TLS|RAY_TLS_.*")
_TLS_MOUNT = "/etc/ray/tls"
_BACKENDS = ("GCS", "S3", "AZUREBLOB", "ALIYUNOSS")


def gates(manifest: Tree) -> Iterator[str]:
    """What of one object needs a gate that is off by default."""
    kind, spec = str(manifest.get("kind")), manifest.get("spec") or {}
    name = f"{kind}/{(manifest.get('metadata') or {}).get('name')}"
    if kind == "RayCronJob":
        yield f"{name}: the operator must have the gate RayCronJob on"
        spec = spec.get("jobTemplate") or {}
    cluster = spec.get("rayClusterConfig") or spec.get("rayClusterSpec") or spec
    backend = (cluster.get("gcsFaultToleranceOptions") or {}).get("backend")
    for needed, gate in (
        (cluster.get("networkPolicy"), "RayClusterNetworkPolicy"),
        ((cluster.get("tlsOptions") or {}).get("enabled"), "RayClusterMTLS"),
        (cluster.get("historyServerOptions"), "RayClusterHistoryServer"),
        (backend == "rocksdb", "GCSFaultToleranceEmbeddedStorage"),
    ):
        if needed:
            yield f"{name}: the operator must have the gate {gate} on"


def gated_rules(spec: Tree, where: str) -> Iterator[Finding]:
    """What the operator would refuse in a cluster, its gates being on."""
    yield from _network(spec, f"{where}.networkPolicy")
    yield from _tls(spec, where)
    yield from _history(spec, f"{where}.historyServerOptions")


def _network(spec: Tree, where: str) -> Iterator[Finding]:
    policy = spec.get("networkPolicy") or {}
    mode = policy.get("mode", "DenyAll")
    groups = {group.get("groupName") for group in spec.get("workerGroupSpecs") or []}
    parts = [(f"{where}.{name}", policy.get(name) or {}) for name in ("head", "worker")]
    for number, part in enumerate(policy.get("workerGroups") or []):
        place = f"{where}.workerGroups[{number}]"
        parts.append((place, part))
        name = str(part.get("groupName"))
        if not _DNS_1123.fullmatch(name):
            yield Finding(
                f"{place}.groupName", "no name of a group", repr(name), "a DNS-1123 label", "rename the group"
            )
        elif name not in groups:
            known = ", ".join(sorted(map(str, groups)))
            yield Finding(f"{place}.groupName", "rules for a group that isn't there", name, known, "name one")
    for place, part in parts:
        for field, forbidden in (("ingressRules", "DenyAllEgress"), ("egressRules", "DenyAllIngress")):
            if part.get(field) and mode == forbidden:
                yield Finding(
                    f"{place}.{field}",
                    "rules for what the mode leaves open",
                    f"mode {mode}",
                    "DenyAll, or none of these rules",
                    "change the mode",
                )


def _tls(spec: Tree, where: str) -> Iterator[Finding]:
    if not (spec.get("tlsOptions") or {}).get("enabled"):
        return
    groups = [("headGroupSpec", spec.get("headGroupSpec") or {})]
    groups += [(f"workerGroupSpecs[{n}]", one) for n, one in enumerate(spec.get("workerGroupSpecs") or [])]
    for name, group in groups:
        pod = (group.get("template") or {}).get("spec") or {}
        for number, container in enumerate(pod.get("containers") or []):
            said = [
                str(one.get("name"))
                for one in container.get("env") or []
                if _TLS_ENV.fullmatch(str(one.get("name")))
            ]
            said += [
                f"a mount at {mount.get('mountPath')}"
                for mount in container.get("volumeMounts") or []
                if mount.get("name") == "ray-tls" or mount.get("mountPath") == _TLS_MOUNT
            ]
            for one in said:
                yield Finding(
                    f"{where}.{name}.template.spec.containers[{number}]",
                    "TLS is said twice",
                    one,
                    "tlsOptions alone",
                    f"leave out {one}",
                )


def _history(spec: Tree, where: str) -> Iterator[Finding]:
    options = spec.get("historyServerOptions")
    if options is None:
        return
    collector = options.get("collectorOptions") or {}
    if not collector.get("image"):
        yield Finding(f"{where}.collectorOptions.image", "no image", "nothing", "an image", "name it")
    env = {one.get("name"): one.get("value") for one in collector.get("env") or []}
    if env.get("STORAGE_BACKEND") not in _BACKENDS:
        yield Finding(
            f"{where}.collectorOptions.env",
            "nowhere to write the history to",
            f"STORAGE_BACKEND {env.get('STORAGE_BACKEND')}",
            ", ".join(_BACKENDS) + ", as a literal value",
            "set it",
        )
