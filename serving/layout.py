"""Which Serve applications a service becomes: pure, so that a laptop and KubeRay deploy the same ones.

One model: one application at `/`. Several: each model is an application of its own at
`/v2/models/NAME`, with its own replicas and scaling, and the ingress sends its requests straight there; an
application at `/` answers for the server as a whole and passes `/v1/models/NAME:predict` on. (An
application has one route prefix, and HAProxy matches whole path segments, longest first.)

With a pool, it stands at `/`: it runs its models there, and does what the front does for the others.

A model's second kind of replica is an application of its own, since all replicas of one ask for the same
resources. Its prefix is the model's behind `/-kinds`, where nobody comes: HAProxy is made to send what comes
to the model's own prefix to both (`serving.ingress`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from serving.service import ServedModel, Service

IMPORT_PATH = "serving.app:build"
DEPLOYMENT = "model"
"""The name of a model's deployment in its application."""
OTHER_PREFIX = "/-kinds"
"""Stands in `haproxy-kinds.awk`, too."""


class Application(NamedTuple):
    """One Serve application, in the words of `serveConfigV2`."""

    name: str
    route_prefix: str | None
    """None: it isn't reached over HTTP."""
    args: dict[str, Any]
    import_path: str = IMPORT_PATH


def applications(service: Service) -> list[Application]:
    """The applications of a service, models first: the front has something to pass on to then."""
    written = service.model_dump(mode="json")
    if len(service.models) == 1:
        return [
            Application(service.name, "/", {"service": written}),
            *_others(service, written),
        ]
    models = [
        Application(
            app_name(service, served),
            f"/v2/models/{served.ref.model}",
            {"service": written, "model": served.ref.model},
        )
        for served in service.own
    ]
    return [*models, *_others(service, written), Application(service.name, "/", {"service": written})]


def grpc_application(service: Service, *, address: str, ingress: str, node_id: str | None) -> Application:
    """The gateway that answers gRPC at `address` (`HOST:PORT`) by asking the HTTP ingress at `ingress`."""
    args = {
        "service": service.model_dump(mode="json"),
        "address": address,
        "ingress": ingress,
        "node_id": node_id,
    }
    # Not the name of a model's application: no model's name begins with a dot.
    return Application(f"{service.name}--.grpc", None, args, "serving.grpc.app:build")


def other_app_name(service: Service, served: ServedModel) -> str:
    """The name of the application that runs a model's second kind of replica."""
    return f"{service.name}--.other.{served.ref.model}"


def _others(service: Service, written: dict[str, Any]) -> list[Application]:
    one = len(service.models) == 1
    return [
        Application(
            other_app_name(service, served),
            OTHER_PREFIX + ("" if one else f"/v2/models/{served.ref.model}"),
            {"service": written, "model": served.ref.model, "other": True},
        )
        for served in service.models
        if served.other_replicas is not None
    ]


def app_name(service: Service, served: ServedModel) -> str:
    """The name of the application that runs a model."""
    return service.name if len(service.models) == 1 else f"{service.name}--{served.ref.model}"
