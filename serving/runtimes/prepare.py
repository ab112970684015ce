"""Turns a graph into one that several processes can map: `python -m serving.runtimes.prepare FOLDER`.

ONNX Runtime optimises the graph for this machine's processor, lays its weights out as its kernels read
them, and writes both: `model.onnx`, small, and `weights.bin`, which sessions map instead of reading. The
layout matters: plain weights can be mapped too, but then either each session keeps a laid-out copy of its
own, or goes without and takes twice as long for a batch of eight (measured: 537 MB of weights in MatMul;
private memory 537 MB and 65 ms, 25 MB and 141 ms, and 25 MB and 63 ms with this).

A program of its own, because the work takes twice the model's memory for some seconds, and a process that
has had memory keeps it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import sys
from pathlib import Path

from cluster.errors import Damaged, shown
from cluster.inference import onnxruntime
from cluster.manifest import Manifest
from cluster.node_folder import boot_id
from cluster.storage import Store

GRAPH, MODEL, WEIGHTS = "graph.onnx", "model.onnx", "weights.bin"
_SMALLEST_SHARED_BYTES = 1024
_GROWTH = 3
"""A prepared graph holds its weights twice, plain and laid out; the graph it is made of lies beside it."""
_PREPARE_WITHIN_S = 600
_SHOWN_CHARS = 2000

logger = logging.getLogger("tandem.serving")


def needed_bytes(graph_bytes: int) -> int:
    """Disk that preparing a graph takes."""
    return _GROWTH * graph_bytes


def cache_key(graph_sha256: str) -> str:
    """A name for a prepared graph: the graph, the release of ONNX Runtime, this machine's processor, and when
    it was last started."""
    cpu = Path("/proc/cpuinfo")
    described = {line for line in cpu.read_text().splitlines() if line.startswith(("model name", "flags"))}
    machine = hashlib.sha256("\n".join(sorted(described)).encode()).hexdigest()[:12]
    return f"{graph_sha256}-ort{onnxruntime().__version__}-{machine}-{boot_id()[:8]}"


def fetch_and_prepare(store: Store, manifest: Manifest, name: str, folder: Path) -> None:
    """Fetch a graph into `folder`, verify it on the way, and prepare it there.

    Raises:
        Damaged: it isn't what the manifest says, or can't be loaded.
        StorageError: the store can't be read.
        OSError: the disk is full.
    """
    entry = manifest.files[name]
    digest, size_bytes = hashlib.sha256(), 0
    with (folder / GRAPH).open("wb") as file:
        for chunk in store.chunks(entry.key):
            digest.update(chunk)
            size_bytes += len(chunk)
            file.write(chunk)
    if (size_bytes, digest.hexdigest()) != (entry.size_bytes, entry.sha256):
        raise Damaged(
            f"'{entry.key}' is not what was written",
            got=f"{size_bytes} bytes, SHA-256 {digest.hexdigest()}",
            allowed=f"{entry.size_bytes} bytes, SHA-256 {entry.sha256}",
            fix="restore the object from a backup, or use an older version",
        )
    done = subprocess.run(
        [sys.executable, "-m", __name__, str(folder)],
        capture_output=True,
        text=True,
        timeout=_PREPARE_WITHIN_S,
        check=False,
    )
    if done.returncode != 0:
        raise Damaged(
            "the servable's graph can't be prepared",
            got=shown(done.stderr.strip()[-_SHOWN_CHARS:].rsplit("\n", 1)[-1]),
            allowed=f"an ONNX model that ONNX Runtime {onnxruntime().__version__} loads",
            fix="export the model again",
        )
    (folder / GRAPH).unlink()


def prepare(folder: Path) -> None:
    """Write `model.onnx` and `weights.bin` from `graph.onnx`, in the same folder."""
    module = onnxruntime()
    options = module.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / MODEL)
    for name, value in {
        "session.optimized_model_external_initializers_file_name": WEIGHTS,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(_SMALLEST_SHARED_BYTES),
        "session.save_external_prepacked_constant_initializers": "1",
    }.items():
        options.add_session_config_entry(name, value)
    module.InferenceSession(str(folder / GRAPH), options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    os.nice(5)  # replicas that serve come first
    prepare(Path(sys.argv[1]))
