"""A servable's files, run in ONNX Runtime: what export checks and what the gate measures.

Serving has a runtime of its own, with batching, warming and swapping; this is the shortest way from
arrays to arrays. Knows nothing of tasks or torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from cluster.errors import NotFound
from cluster.inference import onnxruntime
from cluster.signature import Signature
from training.task import Arrays

GRAPH_FILE = "graph.onnx"
SIGNATURE_FILE = "signature.json"

_ORT_ERRORS_ONLY = 3


class Servable:
    """A loaded servable.

    Args:
        files: its files by name, as `training.export.export` gives them.

    Raises:
        NotFound: from the constructor, where it isn't an ONNX servable.
    """

    def __init__(self, files: Mapping[str, bytes]) -> None:
        for name in (GRAPH_FILE, SIGNATURE_FILE):
            if name not in files:
                raise NotFound(
                    f"the servable has no {name}",
                    got=", ".join(sorted(files)),
                    allowed="an ONNX servable",
                    fix="name a version that was trained as one",
                )
        self.signature = Signature.model_validate_json(files[SIGNATURE_FILE])
        module = onnxruntime()
        options = module.SessionOptions()
        options.log_severity_level = _ORT_ERRORS_ONLY
        # Threads that spin between batches would take the cores from whatever prepares the next one.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = module.InferenceSession(
            files[GRAPH_FILE], options, providers=["CPUExecutionProvider"]
        )
        self._outputs = [tensor.name for tensor in self.signature.outputs]

    def run(self, inputs: Arrays) -> Arrays:
        """One batch: the signature's inputs by name to its outputs by name; strings are str objects."""
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))
