"""One model's request and response forms: bytes in, checked arrays out, and back.

Built once for each loaded version, because everything it can work out from the signature it works out
then. Knows nothing of HTTP servers, queues or runtimes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.signature import Signature
from serving.protocol import oip_answer, oip_request, predict_answer, predict_request
from serving.protocol.limits import Limits
from serving.protocol.metadata import model_metadata
from serving.protocol.requests import Arrays, Headers, InferRequest
from serving.protocol.tensors import TensorReader


class Codec:
    """Reads and writes both protocols for one model.

    Args:
        signature: the servable's.
        model: its name, as answers carry it.
        limits: how much a request may hold.
    """

    def __init__(self, signature: Signature, model: str, limits: Limits | None = None) -> None:
        self.signature = signature
        self.model = model
        self.limits = limits or Limits()
        self.decodes_images = any(tensor.encoding is not None for tensor in signature.inputs)
        """Whether parsing may decode image files: milliseconds, so better not on an event loop."""
        self._readers = {tensor.name: TensorReader(tensor, self.limits) for tensor in signature.inputs}

    def parse_oip(self, body: bytes | memoryview, headers: Mapping[bytes, bytes]) -> InferRequest:
        """Read an Open Inference Protocol v2 request, JSON or with binary tensors.

        Args:
            body: the whole body.
            headers: by lower-case name, as ASGI gives them.

        Raises:
            BadRequest: it can't be read (400).
            TooLarge: it is over a limit (413).
            UnsupportedMedia: its body is compressed (415).
            Unprocessable: it isn't what the model takes (422).
        """
        return oip_request.parse(body, headers, self.signature, self._readers, self.limits)

    def parse_predict(self, body: bytes, content_type: str) -> InferRequest:
        """Read `{"instances": [...]}`, or one image file; raises as `parse_oip` does.

        `content_type` may be empty. JSON and images are told apart by it, or, where it says nothing
        (curl's default form type, application/octet-stream), by the first bytes.
        """
        return predict_request.parse(body, content_type, self._readers, self.limits)

    def render_oip(self, outputs: Arrays, *, request: InferRequest, version: str) -> tuple[bytes, Headers]:
        """The answer to `request` in the form it asked for: body and headers (with content-type)."""
        return oip_answer.render(
            outputs, request=request, model=self.model, version=version, signature=self.signature
        )

    def render_predict(self, outputs: Arrays, *, version: str) -> bytes:
        """`{"model", "version", "predictions": [...]}` as JSON."""
        return predict_answer.render(outputs, model=self.model, version=version, signature=self.signature)

    def metadata(self, versions: Sequence[str], platform: str) -> bytes:
        """The model's metadata in the Open Inference Protocol's form, as JSON."""
        return model_metadata(self.model, versions, self.signature, platform)
