"""ONNX Runtime, told to keep to itself.

Official builds from 1.3x on send usage events to their vendor unless ORT_DISABLE_TELEMETRY is set
before the first import, and write a device id into the temporary folder at import. A server that holds
people's models must do neither, so everything of Tandem gets the module here.
"""

from __future__ import annotations

import os
from typing import Any

_SWITCH = "ORT_DISABLE_TELEMETRY"


def onnxruntime() -> Any:
    """The `onnxruntime` module, its telemetry off unless the environment itself says otherwise."""
    os.environ.setdefault(_SWITCH, "1")
    import onnxruntime as module

    return module
