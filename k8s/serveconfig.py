"""The `serveConfigV2` of a RayService, generated from the service file.

The applications are those that `tandem serve` runs on a laptop (`serving.layout`); replicas, resources
and scaling are set by `serving.app:build` from the same service. So what Kubernetes runs is what was
tried, and nothing is written down twice.
"""

from __future__ import annotations

from typing import Any

from k8s.pods import SERVE_PORT
from serving.layout import applications
from serving.service import Service


def serve_config(service: Service) -> dict[str, Any]:
    """The config as plain data; the operator wants it as YAML text."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": SERVE_PORT},
        "logging_config": {"enable_access_log": False},
        "applications": [application._asdict() for application in applications(service)],
    }
