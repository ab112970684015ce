"""How large a model is taken to be, before it is loaded, and whether a pool can hold it."""

from __future__ import annotations

from collections.abc import Iterable

from cluster.errors import BadInput
from cluster.manifest import Manifest
from cluster.registry import Registry, Version


def files_bytes(manifest: Manifest) -> int:
    """What a servable's files take: an estimate of its weights in memory, and of nothing else."""
    return sum(entry.size_bytes for entry in manifest.files.values())


def check_fits(registry: Registry, versions: Iterable[Version], limit_bytes: int) -> None:
    """Each of these fits into the pool when it is alone there.

    Raises:
        BadInput: one doesn't.
    """
    for version in versions:
        size_bytes = files_bytes(registry.servable(version)[0])
        if size_bytes > limit_bytes:
            raise BadInput(
                f"model '{version.model}' is larger than the whole pool",
                got=f"version {version.version}, {size_bytes} bytes",
                allowed=f"at most {limit_bytes} bytes",
                fix="raise pool.memory_gib, or give the model replicas of its own",
            )
