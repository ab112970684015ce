"""Pod templates that Pod Security's `restricted` level admits, for head, workers and submitter.

Non-root, no privilege to gain, no capability, a read-only root file system with /tmp (Ray's session,
logs and sockets) and /dev/shm (Ray's object store) as volumes, and the service account's token only
where something asks the API server. Probes are HTTP requests to Ray's own health routes, which
answer without the token; the operator's default ones need bash and wget in the image.

Knows what a Ray pod is, not what a recipe or a service is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from k8s.capacity import Group
from k8s.naming import NAME_LABEL, ROLE_LABEL, pod_labels
from k8s.settings import ClusterSettings, Toleration

Role = Literal["head", "worker", "submitter", "launcher"]
Manifest = dict[str, Any]

GCS_PORT, DASHBOARD_PORT, SERVE_PORT = 6379, 8265, 8000
METRICS_PORT, HAPROXY_METRICS_PORT = 8080, 9101
_AGENT_PORT = 52365
_GRACE_S = 30
_SUBMITTER_CPUS, _SUBMITTER_MEMORY_GIB = 1, 1
_GATEWAY_CPUS, _GATEWAY_MEMORY_GIB = 1, 0.5
SERVICE_DIR, SERVICE_FILE = "/service", "service.yaml"


class Owner(NamedTuple):
    """Whose pods these are: the object's name, the part of Tandem, and what differs between them.

    `env` goes to every Ray container, `drain_s` delays the end of a worker that is told to stop,
    `serves` gives pods the port that requests arrive at, `grpc_port` a gateway beside it.
    """

    name: str
    component: Literal["training", "serving"]
    account: str
    env: Mapping[str, str] = {}
    drain_s: float = 0
    serves: bool = False
    grpc_port: int | None = None


def head_template(owner: Owner, settings: ClusterSettings, *, autoscales: bool) -> Manifest:
    """The head's pod. Only the autoscaler beside it talks to the API server."""
    ports = {"gcs-server": GCS_PORT, "dashboard": DASHBOARD_PORT, "metrics": METRICS_PORT}
    container = _ray_container("ray-head", owner, settings, settings.head.cpus, settings.head.memory_gib)
    container["ports"] = _ports(ports | ({"serve": SERVE_PORT} if owner.serves else {}))
    container["livenessProbe"] = _probe("/api/healthz", _AGENT_PORT, period_s=10, failures=12)
    container["readinessProbe"] = _probe("/api/healthz", _AGENT_PORT, period_s=5, failures=10)
    spec = _pod_spec(owner, settings, container, settings.head.memory_gib, grace_s=_GRACE_S)
    spec["automountServiceAccountToken"] = autoscales
    if owner.grpc_port is not None:
        _add_gateway(spec, owner, settings, owner.grpc_port)
    return _template(owner, "head", spec)


def worker_template(owner: Owner, settings: ClusterSettings, group: Group) -> Manifest:
    """The pod of a worker group, filled by its workers or replicas."""
    memory = settings.worker_memory
    memory_gib = memory.base_gib + memory.per_cpu_gib * group.cpus + memory.per_gpu_gib * group.gpus
    container = _ray_container("ray-worker", owner, settings, group.cpus, memory_gib)
    if group.gpus:
        container["resources"]["limits"][settings.gpu.resource] = group.gpus
        container["resources"]["requests"][settings.gpu.resource] = group.gpus
    ports = {"metrics": METRICS_PORT}
    container["livenessProbe"] = _probe("/api/local_raylet_healthz", _AGENT_PORT, period_s=10, failures=12)
    readiness = ("/api/local_raylet_healthz", _AGENT_PORT)
    if owner.serves:
        ports |= {"serve": SERVE_PORT, "haproxy-metrics": HAPROXY_METRICS_PORT}
        # A pod takes requests once the proxy on it knows its routes.
        readiness = ("/-/healthz", SERVE_PORT)
    container["ports"] = _ports(ports)
    container["readinessProbe"] = _probe(*readiness, period_s=5, failures=2 if owner.serves else 10)
    drain_s = math.ceil(owner.drain_s)
    if drain_s:
        # Endpoints forget a pod that is told to stop; meanwhile it answers what it has accepted.
        container["lifecycle"] = {"preStop": {"sleep": {"seconds": drain_s}}}
    spec = _pod_spec(owner, settings, container, memory_gib, grace_s=drain_s + _GRACE_S)
    if group.gpus:
        spec["tolerations"] = spec.get("tolerations", []) + _tolerations(settings.gpu.tolerated)
        if settings.gpu.product:
            spec["nodeSelector"] = spec.get("nodeSelector", {}) | {
                f"{settings.gpu.resource}.product": settings.gpu.product
            }
    if owner.serves:
        spec["topologySpreadConstraints"] = [_spread(owner)]
    if owner.grpc_port is not None:
        _add_gateway(spec, owner, settings, owner.grpc_port)
    return _template(owner, "worker", spec)


def submitter_template(owner: Owner, settings: ClusterSettings) -> Manifest:
    """The pod that hands a job to its cluster and follows its log. The operator fills in the command."""
    container = _container(
        "ray-job-submitter", settings, _sizes(_SUBMITTER_CPUS, _SUBMITTER_MEMORY_GIB), {"HOME": "/tmp"}
    )
    spec = _pod_spec(owner, settings, container, _SUBMITTER_MEMORY_GIB, grace_s=_GRACE_S)
    return _template(owner, "submitter", spec)


def launcher_template(owner: Owner, settings: ClusterSettings, command: list[str]) -> Manifest:
    """The pod that makes a schedule's next RayJob: no Ray, but a token for the API server."""
    container = _container(
        "launcher", settings, _sizes(_SUBMITTER_CPUS, _SUBMITTER_MEMORY_GIB), {"HOME": "/tmp"}
    )
    # The Kubernetes Job's name, which tells the time that it was due.
    due = {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-name']"}}
    container["env"].append({"name": "TANDEM_JOB_NAME", "valueFrom": due})
    container["command"] = command
    account = owner._replace(account=f"{owner.name}-schedule")
    spec = _pod_spec(account, settings, container, _SUBMITTER_MEMORY_GIB, grace_s=_GRACE_S)
    spec["automountServiceAccountToken"] = True
    return _template(owner, "launcher", spec)


def _add_gateway(pod: Manifest, owner: Owner, settings: ClusterSettings, port: int) -> None:
    """gRPC beside the pod's ingress: a sidecar, which starts again by itself and ends after Ray does."""
    container = _container("grpc", settings, _sizes(_GATEWAY_CPUS, _GATEWAY_MEMORY_GIB), {"HOME": "/tmp"})
    if settings.store_secret:
        container["envFrom"] = [{"secretRef": {"name": settings.store_secret}}]
    container["env"] += [{"name": key, "value": value} for key, value in sorted(settings.env.items())]
    container["command"] = [
        "python",
        "-m",
        "serving.grpc.beside",
        f"{SERVICE_DIR}/{SERVICE_FILE}",
        f"--address=0.0.0.0:{port}",
        f"--ingress=http://127.0.0.1:{SERVE_PORT}",
    ]
    container["restartPolicy"] = "Always"
    container["ports"] = _ports({"grpc": port})
    container["readinessProbe"] = {"tcpSocket": {"port": port}, "periodSeconds": 5, "failureThreshold": 2}
    container["volumeMounts"].append({"name": "service", "mountPath": SERVICE_DIR, "readOnly": True})
    pod["initContainers"] = [container]
    pod["volumes"].append({"name": "service", "configMap": {"name": service_file_name(owner.name)}})


def service_file_name(name: str) -> str:
    """The ConfigMap with the service's file. Without a hash: a new name would mean a new cluster."""
    return f"{name}-service"


def container_security() -> Manifest:
    """What `restricted` asks of a container, and a read-only root file system besides."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def quantity_gib(gib: float) -> str:
    """A Kubernetes quantity of memory, in whole MiB."""
    return f"{math.ceil(gib * 1024)}Mi"


def _template(owner: Owner, role: Role, spec: Manifest) -> Manifest:
    return {"metadata": {"labels": pod_labels(owner.name, owner.component, role)}, "spec": spec}


def _ray_container(
    name: str, owner: Owner, settings: ClusterSettings, cpus: int, memory_gib: float
) -> Manifest:
    env = {"HOME": "/tmp", **owner.env, **settings.env}
    container = _container(name, settings, _sizes(cpus, memory_gib), env)
    if settings.store_secret:
        container["envFrom"] = [{"secretRef": {"name": settings.store_secret}}]
    return container


def _container(name: str, settings: ClusterSettings, sizes: Manifest, env: Mapping[str, str]) -> Manifest:
    return {
        "name": name,
        "image": settings.image,
        "imagePullPolicy": "IfNotPresent",
        "env": [{"name": key, "value": value} for key, value in sorted(env.items())],
        # What is asked for is what may be used: the pod is never the first to be evicted.
        "resources": {"limits": dict(sizes), "requests": dict(sizes)},
        "securityContext": container_security(),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "shm", "mountPath": "/dev/shm"}],
    }


def _pod_spec(
    owner: Owner, settings: ClusterSettings, container: Manifest, memory_gib: float, *, grace_s: int
) -> Manifest:
    shared = quantity_gib(memory_gib / 2)
    spec: Manifest = {
        "serviceAccountName": owner.account,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        # A Ray process that ended is no node of its cluster any more: a new pod replaces it.
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": grace_s,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": settings.user_id,
            "runAsGroup": settings.group_id,
            "fsGroup": settings.group_id,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "tmp", "emptyDir": {"sizeLimit": f"{settings.scratch_gib}Gi"}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": shared}},
        ],
    }
    if settings.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    if settings.priority_class:
        spec["priorityClassName"] = settings.priority_class
    if settings.node_selector:
        spec["nodeSelector"] = dict(settings.node_selector)
    if settings.tolerations:
        spec["tolerations"] = _tolerations(settings.tolerations)
    return spec


def _sizes(cpus: int, memory_gib: float) -> Manifest:
    return {"cpu": str(cpus), "memory": quantity_gib(memory_gib)}


def _ports(ports: Mapping[str, int]) -> list[Manifest]:
    return [{"name": name, "containerPort": port} for name, port in ports.items()]


def _probe(path: str, port: int, *, period_s: int, failures: int) -> Manifest:
    return {
        "httpGet": {"path": path, "port": port},
        "initialDelaySeconds": 10,
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _tolerations(tolerations: tuple[Toleration, ...]) -> list[Manifest]:
    return [toleration.model_dump(mode="json", exclude_none=True) for toleration in tolerations]


def _spread(owner: Owner) -> Manifest:
    """Over the nodes, as far as possible: one node lost is then one replica lost."""
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {NAME_LABEL: owner.name, ROLE_LABEL: "worker"}},
    }
