"""ONNX Runtime's telemetry is off before its first import."""

import os
import subprocess
import sys
from pathlib import Path


def test_nothing_is_written_or_sent_at_import(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"} | {"TMPDIR": str(tmp_path)}
    code = "from cluster.inference import onnxruntime; onnxruntime().get_available_providers()"
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []
