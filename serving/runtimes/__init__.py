"""The runtimes, and how a servable names the one that runs it."""

from __future__ import annotations

from cluster.errors import Damaged, shown
from cluster.manifest import Manifest, read_file
from cluster.signature import Signature
from cluster.storage import Store
from serving.runtimes.base import Runtime

GRAPH = "graph.onnx"


def load_runtime(store: Store, manifest: Manifest, signature: Signature, *, threads: int) -> Runtime:
    """Load a servable's graph, verified, into the runtime that `meta["runtime"]` names.

    Args:
        threads: threads that one batch may use; 0 lets the runtime choose.

    Raises:
        Damaged: the bytes, the graph or the name of the runtime are not what they should be.
        StorageError: the store can't be read.
    """
    name = manifest.meta.get("runtime")
    if name != "onnx":
        raise Damaged(
            "the servable names a runtime that isn't here",
            got=shown(name),
            allowed="onnx",
            fix="serve it with the release that exported it",
        )
    from serving.runtimes.onnx import OnnxRuntime  # loads shared libraries: only where they're needed

    return OnnxRuntime(read_file(store, manifest, GRAPH), signature, threads=threads)
