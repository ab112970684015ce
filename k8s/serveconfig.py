"""The `serveConfigV2` of a RayService, generated from the service file.

Kept to what only this text can say: the application's import path, its arguments and where HTTP
listens. Replicas, resources and scaling are set by `serving.app:build` from the same service, so
that a laptop and a cluster run the same thing, and nothing is written down twice.
"""

from __future__ import annotations

from typing import Any

from k8s.naming import as_written
from k8s.pods import SERVE_PORT
from serving.service import Service

IMPORT_PATH = "serving.app:build"


def serve_config(service: Service) -> dict[str, Any]:
    """The config as plain data; the operator wants it as YAML text."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": SERVE_PORT},
        "applications": [
            {
                "name": service.name,
                "import_path": IMPORT_PATH,
                "route_prefix": "/",
                "args": {"service": as_written(service)},
            }
        ],
    }
