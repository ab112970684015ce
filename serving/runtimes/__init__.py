"""The runtimes, and how a servable names the one that runs it.

ONNX graphs run here. An installed package may bring another runtime: an entry point of the group
`tandem.runtimes`, whose name is what servables say and whose value is called as `load_runtime` is, without
`cache`. What isn't installed is never run: a servable names a runtime, it doesn't carry one.
"""

from __future__ import annotations

import logging
from importlib.metadata import entry_points

from cluster.errors import Damaged, shown
from cluster.manifest import Manifest, read_file
from cluster.signature import Signature
from cluster.storage import Store
from serving.runtimes.base import Runtime
from serving.runtimes.node_cache import Held, NodeCache

logger = logging.getLogger("tandem.serving")

GRAPH = "graph.onnx"
LARGE_BYTES = 8 * 1024 * 1024
"""From this size on a graph is prepared and shared; smaller ones load in milliseconds as they are."""


def load_runtime(
    store: Store,
    manifest: Manifest,
    signature: Signature,
    *,
    threads: int,
    cache: NodeCache | None = None,
) -> Runtime:
    """Load a servable's graph, verified, into the runtime that `meta["runtime"]` names.

    Args:
        threads: threads that one batch may use; 0 lets the runtime choose.
        cache: where large graphs are kept for all replicas of this node; None: each reads its own.

    Raises:
        Damaged: the bytes, the graph or the name of the runtime are not what they should be.
        StorageError: the store can't be read.
    """
    name = manifest.meta.get("runtime")
    if name != "onnx":
        brought = {entry.name: entry for entry in entry_points(group="tandem.runtimes")}
        if name not in brought:
            raise Damaged(
                "the servable names a runtime that isn't here",
                got=shown(name),
                allowed=", ".join(["onnx", *brought]),
                fix="serve it with the release that exported it, or install the package with its runtime",
            )
        runtime: Runtime = brought[name].load()(store, manifest, signature, threads=threads)
        return runtime
    # Loads shared libraries: only where they're needed.
    from serving.runtimes.onnx import OnnxRuntime, runs_on_cpu

    large = GRAPH in manifest.files and manifest.files[GRAPH].size_bytes >= LARGE_BYTES
    if large and cache is not None and runs_on_cpu():
        held = _prepared(store, manifest, cache)
        if held is not None:
            try:
                return OnnxRuntime(held, signature, threads=threads)
            except BaseException:
                held.release()
                raise
    return OnnxRuntime(read_file(store, manifest, GRAPH), signature, threads=threads)


def _prepared(store: Store, manifest: Manifest, cache: NodeCache) -> Held | None:
    """The graph as it lies prepared on this node; None where the disk has no room for it or fails."""
    from serving.runtimes.prepare import cache_key, fetch_and_prepare, needed_bytes

    entry = manifest.files[GRAPH]
    try:
        return cache.hold(
            cache_key(entry.sha256),
            lambda folder: fetch_and_prepare(store, manifest, GRAPH, folder),
            needs_bytes=needed_bytes(entry.size_bytes),
        )
    except OSError as error:
        logger.warning("the graph can't be shared between the replicas of this node: %s", error)
        return None
