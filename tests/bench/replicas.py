"""What replicas of one node cost: memory for the weights, the time to load them, the start of a process.

Processes that load a model exactly as a replica does (`serving.replica`), without Ray around them:

    weights   500 MB of them: memory of four replicas beside that of one (PSS: what is shared counts once),
              and the second replica's load beside the first one's on a node that has never seen the model
    start     from the start of the process to the first answer, 20 MB of weights, beside a process that
              imports torch and runs the same layers there; both import Ray Serve, as whatever it starts does

    python -m tests.bench.replicas [--only weights,start] [--pairs 5] [--out FILE]
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

from cluster.signature import Signature, Tensor
from cluster.storage import open_store
from tests.bench.asked import asked, finished
from tests.bench.machine import REPO, distributions, machine_facts, use_cores
from tests.bench.pairs import Comparison, Measure, Report, in_turn
from tests.bench.replica_process import MODEL
from tests.servables import publish

CORES = 2
READY_WITHIN_S = 120
REPLICAS = 4
LARGE = (2048, 30)
"""Width and layers: 500 MB of float32."""
SMALL = (1024, 5)


def graph(width: int, layers: int) -> bytes:
    """`layers` square layers of `width`, each with weights of its own."""
    rng = np.random.default_rng(0)
    nodes, weights, last = [], [], "x"
    for layer in range(layers):
        square = rng.standard_normal((width, width), dtype=np.float32) / np.float32(width**0.5)
        weights.append(numpy_helper.from_array(square, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Relu", [f"m{layer}"], [f"h{layer}"]))
        last = f"h{layer}"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in "xy")
    made = helper.make_graph(nodes, "wide", [x], [y], weights)
    opsets = [helper.make_opsetid("", 20)]
    return bytes(helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString())


def signature(width: int) -> Signature:
    """Of `graph`."""
    x, y = (Tensor(name=name, dtype="FP32", shape=(-1, width)) for name in "xy")
    return Signature(task="wide", inputs=(x,), outputs=(y,))


class Process:
    """A replica, or the peer, in a process of its own that waits after its first answer."""

    def __init__(self, kind: str, *arguments: str) -> None:
        began_s = time.monotonic()
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.replica_process", kind, *arguments],
            cwd=REPO,
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
        )
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        self.start_s = time.monotonic() - began_s
        if not line:
            raise RuntimeError(f"a {kind} ended with {self._child.wait()}")
        self.load_s: float = json.loads(line)["load_s"]

    def pss_bytes(self) -> int:
        """Its memory; what is shared with n others counts by an n-th."""
        return int(psutil.Process(self._child.pid).memory_full_info().pss)

    def stop(self) -> None:
        self._child.kill()
        self._child.wait(30)


@contextlib.contextmanager
def process(kind: str, *arguments: str) -> Iterator[Process]:
    """Started, answered once, and killed at the end of the `with`."""
    started = Process(kind, *arguments)
    try:
        yield started
    finally:
        started.stop()


class Questions:
    """Each question is a method; what it finds goes into the report."""

    def __init__(self, report: Report, folder: Path, pairs: int) -> None:
        self._report = report
        self._folder = folder
        self._pairs = pairs

    def weights(self) -> None:
        store = str(self._folder / "large")
        publish(open_store(store), MODEL, graph(*LARGE), signature(LARGE[0]))
        memory, loads = [], []
        for _ in range(self._pairs):
            cache = self._folder / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            with contextlib.ExitStack() as stack:
                found = [stack.enter_context(process("replica", store, str(cache), str(LARGE[0])))]
                alone = found[0].pss_bytes()
                for _ in range(REPLICAS - 1):
                    found.append(stack.enter_context(process("replica", store, str(cache), str(LARGE[0]))))
                memory.append((float(sum(one.pss_bytes() for one in found)), float(alone)))
                loads.append((found[1].load_s, found[0].load_s))
        add = self._report.comparisons.append
        mib = tuple((ours / 2**20, alone / 2**20) for ours, alone in memory)
        add(Comparison("memory (PSS), MiB", f"{REPLICAS} replicas", "one", mib, at_most=1.3))
        add(Comparison("load, s", "second replica", "first on the node", tuple(loads), at_most=0.2))

    def start(self) -> None:
        store = str(self._folder / "small")
        publish(open_store(store), MODEL, graph(*SMALL), signature(SMALL[0]))
        cache, width = str(self._folder / "start-cache"), str(SMALL[0])
        weights = str(self._folder / "weights.safetensors")
        save_file({f"w{n}": np.ones((SMALL[0], SMALL[0]), np.float32) for n in range(SMALL[1])}, weights)

        def seconds(kind: str, *arguments: str) -> float:
            with process(kind, *arguments) as one:
                return one.start_s

        seconds("replica", store, cache, width)  # uncounted: both have been read from the disk once
        seconds("torch", weights, width)
        found = in_turn(
            lambda: seconds("replica", store, cache, width),
            lambda: seconds("torch", weights, width),
            self._pairs,
        )
        self._report.comparisons.append(
            Comparison("process start to first answer, s", "Tandem", "with torch", tuple(found), at_most=0.5)
        )
        bare = tuple(seconds("bare") for _ in range(self._pairs))
        self._report.measures.append(Measure("of which Python and Ray Serve's own imports, s", bare))


def main() -> int:
    chosen = asked(__doc__, only=(str, "weights,start", "questions, by commas"))
    use_cores(CORES)
    versions = {"both": distributions("tandem-ray", "ray", "onnxruntime", "torch")}
    report = Report("Replicas of one node", machine_facts(), versions)
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as name:
        questions = Questions(report, Path(name), chosen.pairs)
        for question in chosen.only.split(","):
            getattr(questions, question)()
    return finished(report, chosen)


if __name__ == "__main__":
    raise SystemExit(main())
