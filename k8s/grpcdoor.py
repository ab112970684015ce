"""gRPC for a service: the file that each pod's gateway reads, and the address that callers use.

The gateways stand in the pods (`k8s.pods`), beside the HTTP ingress that they ask. A pod takes calls once
both are ready, so one Service over the pods that take HTTP is all that is needed.
"""

from __future__ import annotations

from k8s.guards import metadata
from k8s.naming import COMPONENT_LABEL, NAME_LABEL, ROLE_LABEL, as_written
from k8s.pods import SERVICE_FILE, Manifest, Owner, service_file_name
from k8s.settings import ClusterSettings
from k8s.yamltext import to_yaml
from serving.service import Service


def grpc_door(service: Service, owner: Owner, settings: ClusterSettings, *, head_too: bool) -> list[Manifest]:
    """The ConfigMap and the Service `NAME-grpc`; nothing where no gRPC is asked for.

    Args:
        head_too: whether the head takes requests, because all workers may be gone.
    """
    if owner.grpc_port is None:
        return []
    selector = {NAME_LABEL: owner.name, COMPONENT_LABEL: owner.component}
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": metadata(service_file_name(owner.name), owner, settings),
            "data": {SERVICE_FILE: to_yaml(as_written(service))},
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata(f"{owner.name}-grpc", owner, settings),
            "spec": {
                "selector": selector if head_too else selector | {ROLE_LABEL: "worker"},
                "ports": [
                    {
                        "name": "grpc",
                        "port": owner.grpc_port,
                        "protocol": "TCP",
                        "appProtocol": "kubernetes.io/h2c",
                    }
                ],
            },
        },
    ]
