"""What a plan is made of: one changed field, and how a cluster is found in the object that it stands in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Manifest = Mapping[str, Any]
Effect = Literal["in place", "new cluster", "waits", "new object", "left behind"]

CLUSTER_FIELD = {"RayService": "rayClusterConfig", "RayJob": "rayClusterSpec"}
"""Where in the spec an object has its cluster."""


@dataclass(frozen=True, slots=True)
class Change:
    """One field that differs."""

    object: str
    """`KIND/NAME`."""
    path: str
    old: Any
    """None: it isn't there."""
    new: Any
    effect: Effect
    why: str
    cause: bool = True
    """Whether this alone would have that effect. What waits for a new cluster comes along with one."""


def object_name(manifest: Manifest) -> str:
    """`KIND/NAME`."""
    return f"{manifest.get('kind')}/{(manifest.get('metadata') or {}).get('name')}"


def cluster_of(manifest: Manifest) -> Mapping[str, Any]:
    """The spec of the cluster in a RayService or RayJob."""
    return (manifest.get("spec") or {}).get(CLUSTER_FIELD[str(manifest["kind"])]) or {}


def strategy_of(manifest: Manifest) -> str:
    """How a RayService is upgraded; the operator's default is NewCluster."""
    return str(((manifest.get("spec") or {}).get("upgradeStrategy") or {}).get("type") or "NewCluster")
