"""What each call of the gRPC service means: one request to the HTTP ingress, and its answer translated.

The ingress, the replicas' queues, keys and their limits, deadlines, priorities, trials and versions are all
where they are for HTTP, so gRPC has no meaning of its own to keep in step. What is added is the model's
name, which gRPC has in the message and HTTP in the path: one port serves every model of the service, and
the ingress still spreads single requests, not connections, over the replicas.

Knows bytes and metadata, not gRPC's server.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from google.protobuf.message import DecodeError

from cluster.errors import BadRequest, NotFound, NotReady, Overloaded, TandemError, shown
from serving.grpc import translate
from serving.grpc.ingress import Ingress
from serving.grpc.messages import (
    ModelMetadataRequest,
    ModelReadyRequest,
    ModelReadyResponse,
    ServerLiveResponse,
    ServerReadyResponse,
)
from serving.grpc.refusals import Answer, Metadata, metadata_of, refused
from serving.guard import Guard
from serving.http import request_id
from serving.protocol.failures import render_error
from serving.protocol.requests import HEADER_LENGTH
from serving.protocol.terms import TIMEOUT_HEADER
from serving.service import Service

logger = logging.getLogger("tandem.serving")

Headers = Mapping[bytes, bytes]
_PASSED_ON = (
    "authorization",
    "x-api-key",
    "x-request-priority",
    "x-session-id",
    "traceparent",
    "tracestate",
)
"""Metadata that means in HTTP what it means here."""
_VERSION = re.compile(r"[A-Za-z0-9._-]{1,128}")
_LONG_BYTES = 128 * 1024
MESSAGE_ROOM_BYTES = 64 * 1024
"""What a message may hold beside its tensors."""


class Call:
    """One call as it came: its metadata as HTTP headers, its id, and how much time it has.

    Args:
        metadata: by lower-case name; binary metadata left out.
        remaining_s: until the client's deadline; None without one.
    """

    def __init__(self, metadata: Mapping[str, str], remaining_s: float | None) -> None:
        self.headers = {name.encode(): value.encode("latin-1", "replace") for name, value in metadata.items()}
        self.id = request_id(self.headers)
        self.passed_on = {name: metadata[name] for name in _PASSED_ON if name in metadata}
        self.passed_on["x-request-id"] = self.id
        timeouts_s = [_seconds(self.headers.get(TIMEOUT_HEADER)), remaining_s]
        if least := [timeout_s for timeout_s in timeouts_s if timeout_s is not None]:
            self.passed_on[TIMEOUT_HEADER.decode()] = f"{max(min(least), 1e-6):.6f}"


class Gateway:
    """Answers calls.

    Args:
        service: which models there are, and how large their requests may be.
        guard: asks callers for a key before their message is read; None where none is needed. The
            replicas ask for it again.
    """

    def __init__(self, service: Service, ingress: Ingress, guard: Guard | None = None) -> None:
        self._ingress = ingress
        self._guard = guard
        self._max_bytes = {served.ref.model: served.max_body_bytes for served in service.models}
        self.max_message_bytes = max(self._max_bytes.values()) + MESSAGE_ROOM_BYTES
        self._room_bytes = 4 * self.max_message_bytes

    def replace(self, service: Service) -> None:
        """From the next call on there are these models. `max_message_bytes` stays what it was."""
        self._max_bytes = {served.ref.model: served.max_body_bytes for served in service.models}

    def admit(self, call: Call) -> AbstractContextManager[object]:
        """Let a call in until the `with` ends.

        Raises:
            Unauthorized, RateLimited: as `Guard.admit`.
        """
        return nullcontext() if self._guard is None else self._guard.admit(dict(call.headers))

    async def server_live(self, call: Call, message: bytes) -> tuple[Any, Metadata]:
        return ServerLiveResponse(live=True), metadata_of(Answer(200, {}, b""), call.id)

    async def server_ready(self, call: Call, message: bytes) -> tuple[Any, Metadata]:
        answer = await self._ask(call, "GET", "/v2/health/ready")
        return ServerReadyResponse(ready=answer.status == 200), metadata_of(answer, call.id)

    async def server_metadata(self, call: Call, message: bytes) -> tuple[Any, Metadata]:
        answer = await self._ask_well(call, "GET", "/v2")
        return translate.server_metadata(answer.body), metadata_of(answer, call.id)

    async def model_ready(self, call: Call, message: bytes) -> tuple[Any, Metadata]:
        asked = _read(ModelReadyRequest, message)
        answer = await self._ask(call, "GET", f"{self._path(asked.name, asked.version)}/ready")
        if answer.status not in (200, 503):
            raise refused(answer, call.id)
        return ModelReadyResponse(ready=answer.status == 200), metadata_of(answer, call.id)

    async def model_metadata(self, call: Call, message: bytes) -> tuple[Any, Metadata]:
        asked = _read(ModelMetadataRequest, message)
        answer = await self._ask_well(call, "GET", self._path(asked.name, asked.version))
        return translate.model_metadata(answer.body), metadata_of(answer, call.id)

    async def model_infer(self, call: Call, message: bytes) -> tuple[Any, Metadata]:
        with self._held(len(message)):
            asked = translate.read_infer_request(message)
            path = self._path(asked.model_name, asked.model_version)
            max_bytes = self._max_bytes[asked.model_name]
            is_long = len(message) > _LONG_BYTES and not asked.raw_input_contents
            pack = translate.to_http
            body, json_bytes = (
                await asyncio.to_thread(pack, asked, max_bytes) if is_long else pack(asked, max_bytes)
            )
            lengths = {
                "content-type": "application/octet-stream",
                HEADER_LENGTH.decode(): str(json_bytes),
            }
            answer = await self._ask_well(call, "POST", f"{path}/infer", lengths, body)
            return translate.from_http(answer.body, answer.headers), metadata_of(answer, call.id)

    def _path(self, model: str, version: str) -> str:
        """Where HTTP has the model. Made of known names only.

        Raises:
            NotFound: there is no such model, or nothing that could be a version.
        """
        if model not in self._max_bytes:
            raise NotFound(
                "no such model is served", got=shown(model), allowed=", ".join(sorted(self._max_bytes))
            )
        if not version:
            return f"/v2/models/{model}"
        if not _VERSION.fullmatch(version) or version.strip(".") == "":
            raise NotFound(
                f"version {shown(version)} of model '{model}' is not in service",
                fix="leave the version out to get the one in service",
            )
        return f"/v2/models/{model}/versions/{version}"

    @contextmanager
    def _held(self, message_bytes: int) -> Iterator[None]:
        """Memory for a message while it is worked on.

        Raises:
            Overloaded: large messages take all that there is.
        """
        if message_bytes > self._room_bytes:
            raise Overloaded("too many large requests are arriving at once", retry_after_s=1)
        self._room_bytes -= message_bytes
        try:
            yield
        finally:
            self._room_bytes += message_bytes

    async def _ask_well(
        self, call: Call, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Answer:
        """As `_ask`, where only an answer of 200 will do.

        Raises:
            Refused: another one came.
        """
        answer = await self._ask(call, method, path, headers, body)
        if answer.status != 200:
            raise refused(answer, call.id)
        return answer

    async def _ask(
        self, call: Call, method: str, path: str, headers: Mapping[str, str] | None = None, body: bytes = b""
    ) -> Answer:
        try:
            return await self._ingress.ask(method, path, call.passed_on | dict(headers or {}), body)
        except OSError as error:
            logger.warning("request %s: %s", call.id, error)
            raise NotReady("no replica could be reached", retry_after_s=1, fix="try again") from error


def explain(error: Exception, call: Call) -> Answer:
    """An error of ours as the answer that HTTP would have given."""
    status, body, headers = render_error(error, call.id)
    if not isinstance(error, TandemError):
        logger.error("request %s failed", call.id, exc_info=error)
    return Answer(status, dict(headers), body)


def _read(kind: Any, message: bytes) -> Any:
    try:
        return kind.FromString(message)
    except DecodeError:
        raise BadRequest("the message can't be read", allowed=f"a {kind.DESCRIPTOR.name}") from None


def _seconds(text: bytes | None) -> float | None:
    """A positive number of seconds; None for anything else, as HTTP passes it over."""
    try:
        found = float(text) if text is not None and len(text) <= 32 else math.nan
    except ValueError:
        return None
    return found if found > 0 and math.isfinite(found) else None
