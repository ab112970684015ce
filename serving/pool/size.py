"""How large a model is taken to be, before it is loaded, and whether a pool can hold it.

The size of its files, which is near that of its weights. Measured with ONNX Runtime 1.32, a model of one
matrix that has run a batch of 64 holds 1.7 times its file of 0.25 MiB, 1.5 times one of 2 MiB and 1.1 times
one of 7 MiB: weights laid out for the kernels and the batch's arrays come on top. All but 1% of it is free
again after the model is closed (0.25 MiB: all but a seventh).
"""

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
