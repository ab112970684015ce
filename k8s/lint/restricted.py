"""Pod Security's `restricted` level, checked on the pods as the operator will make them.

What is written isn't all that runs (`k8s.lint.made`): a hardened head is refused for a sidecar that nobody
wrote down, so those count here.

Source of the rules: the Kubernetes documentation, "Pod Security Standards", restricted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from k8s.lint.finding import Finding
from k8s.lint.made import pods

Tree = Mapping[str, Any]

_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
_ADDED = {"NET_BIND_SERVICE"}
_SECCOMP = ("RuntimeDefault", "Localhost")
_SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
}


def not_restricted(manifest: Tree) -> Iterator[Finding]:
    """What the `restricted` level would refuse of the pods of one object."""
    for where, pod in pods(manifest):
        yield from _pod(pod, where)


def _pod(pod: Tree, where: str) -> Iterator[Finding]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield _bad(f"{where}.{field}", "the node's own namespace", "true", "false", "leave it out")
    for number, volume in enumerate(pod.get("volumes") or []):
        for kind in sorted(set(volume) - {"name"} - _VOLUMES):
            yield _bad(
                f"{where}.volumes[{number}]",
                "a volume of the node",
                kind,
                ", ".join(sorted(_VOLUMES)),
                "use one",
            )
    context = pod.get("securityContext") or {}
    for one in context.get("sysctls") or []:
        if one.get("name") not in _SYSCTLS:
            yield _bad(
                f"{where}.securityContext.sysctls",
                "a kernel setting",
                str(one.get("name")),
                "safe ones",
                "remove it",
            )
    for kind in ("initContainers", "containers"):
        for container in pod.get(kind) or []:
            yield from _container(container, context, f"{where}.{kind}[{container.get('name')}]")


def _container(container: Tree, pod: Tree, where: str) -> Iterator[Finding]:
    own = container.get("securityContext") or {}
    place = f"{where}.securityContext"
    if own.get("privileged"):
        yield _bad(f"{place}.privileged", "a container with all rights", "true", "false", "leave it out")
    if own.get("allowPrivilegeEscalation") is not False:
        got = str(own.get("allowPrivilegeEscalation"))
        yield _bad(f"{place}.allowPrivilegeEscalation", "rights may be gained", got, "false", "set it")
    dropped = (own.get("capabilities") or {}).get("drop") or []
    if "ALL" not in dropped:
        yield _bad(f"{place}.capabilities.drop", "capabilities are kept", str(dropped), "[ALL]", "drop them")
    added = set((own.get("capabilities") or {}).get("add") or []) - _ADDED
    if added:
        yield _bad(
            f"{place}.capabilities.add",
            "capabilities are added",
            ", ".join(sorted(added)),
            "none",
            "remove it",
        )
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield _bad(
            f"{place}.runAsNonRoot", "it may run as root", "not said", "true, here or for the pod", "set it"
        )
    if own.get("runAsUser", pod.get("runAsUser")) == 0:
        yield _bad(f"{place}.runAsUser", "it runs as root", "0", "any other", "choose one")
    seccomp = (own.get("seccompProfile") or pod.get("seccompProfile") or {}).get("type")
    if seccomp not in _SECCOMP:
        yield _bad(
            f"{place}.seccompProfile",
            "system calls aren't filtered",
            str(seccomp),
            " or ".join(_SECCOMP),
            "set it",
        )
    if own.get("procMount") not in (None, "Default"):
        yield _bad(
            f"{place}.procMount", "/proc is unmasked", str(own["procMount"]), "Default", "leave it out"
        )
    for port in container.get("ports") or []:
        if port.get("hostPort"):
            yield _bad(
                f"{where}.ports", "a port of the node", str(port["hostPort"]), "none", "leave hostPort out"
            )


def _bad(path: str, problem: str, got: str, allowed: str, fix: str) -> Finding:
    return Finding(path, f"Pod Security (restricted) refuses the pod: {problem}", got, allowed, fix)
