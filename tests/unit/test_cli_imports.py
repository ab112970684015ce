"""`tandem --help` is quick because nothing heavy is imported until a command needs it."""

import json
import subprocess
import sys

HEAVY = ("ray", "torch", "onnx", "onnxruntime", "pyarrow", "numpy", "sklearn", "grpc", "obstore")


def test_importing_the_front_door_loads_nothing_heavy() -> None:
    code = "import sys, json, cluster.cli; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(json.loads(done.stdout))
    assert not loaded & set(HEAVY)
    assert not [name for name in loaded if name.split(".")[0] in ("training", "serving", "k8s")]
