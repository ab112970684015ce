"""What a replica has on its node: the folder of large graphs, and its log of requests."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from cluster.node_folder import node_folder
from serving.runtimes.node_cache import NodeCache
from serving.service import Service

logger = logging.getLogger("tandem.serving")


def log_file(model: str) -> Path:
    """Where this replica writes down requests: beside Serve's own logs, which Ray's log shippers read."""
    from ray.serve._private.logging_utils import get_serve_logs_dir

    return Path(get_serve_logs_dir()) / f"tandem-requests-{model}-{os.getpid()}.jsonl"


def node_cache(service: Service) -> NodeCache | None:
    """Where this node keeps large graphs; None where it is to keep none, or can't."""
    try:
        folder = node_folder("graphs") if service.cache_gib else None
    except (OSError, RuntimeError) as error:
        logger.warning("large graphs can't be shared between the replicas of this node: %s", error)
        return None
    return NodeCache(folder, int(service.cache_gib * 2**30)) if folder is not None else None
