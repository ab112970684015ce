"""Commands are quick because nothing heavy is imported until it is needed."""

import gc
import json
import subprocess
import sys

from cluster.imports import uncollected

HEAVY = ("ray", "torch", "onnx", "onnxruntime", "pyarrow", "numpy", "sklearn", "grpc", "obstore")


def loaded_by(statements: str) -> set[str]:
    code = f"import sys, json\n{statements}\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    return set(json.loads(done.stdout))


def test_importing_the_front_door_loads_nothing_heavy() -> None:
    loaded = loaded_by("import cluster.cli")
    assert not loaded & set(HEAVY)
    assert not [name for name in loaded if name.split(".")[0] in ("training", "serving", "k8s")]


def test_a_run_begins_with_nothing_heavy_but_the_store() -> None:
    assert not loaded_by("import training.run") & (set(HEAVY) - {"obstore"})


def test_recipes_of_built_in_tasks_are_checked_without_torch() -> None:
    loaded = loaded_by(
        "import training.checks\n"
        "from training.tasks import BUILT_IN, resolve_task\n"
        "for name in BUILT_IN: resolve_task(name)"
    )
    assert not loaded & {"torch", "ray"}


def test_imports_are_not_collected_and_then_all_is_as_before() -> None:
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
