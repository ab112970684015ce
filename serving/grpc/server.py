"""The gRPC server: calls come in within bounds, answers and refusals go out.

A call is asked for its key, and then its message is read. (That is why the unary methods are declared as
streams of requests here, which look the same on the wire: gRPC reads a unary message before it calls
anybody.) Methods of the protocol that aren't here answer UNIMPLEMENTED.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import nullcontext
from typing import Any

import grpc
import grpc.aio

from cluster.errors import BadInput, BadRequest, TooSlow
from serving.grpc.gateway import Call, Gateway, explain
from serving.grpc.messages import SERVICE, ModelStreamInferResponse
from serving.grpc.refusals import Metadata, Refused, refused
from serving.http import BODY_GRACE_S, BODY_MIN_BYTES_PER_S

MAX_CALLS = 2048
"""At the same time; further ones get RESOURCE_EXHAUSTED."""
_NO_DEADLINE_S = 1e8
"""gRPC may tell of a deadline years from now where there is none."""
_MIN_PING_INTERVAL_MS = 10_000

Method = Callable[[Call, bytes], Awaitable[tuple[Any, Metadata]]]


async def start_server(gateway: Gateway, address: str) -> grpc.aio.Server:
    """A server that listens at `address` (`HOST:PORT`).

    Raises:
        BadInput: it can't listen there.
    """
    server = grpc.aio.server(
        maximum_concurrent_rpcs=MAX_CALLS,
        options=[
            ("grpc.max_receive_message_length", gateway.max_message_bytes),
            ("grpc.max_send_message_length", -1),
            # Or a second service would share the port with the first, and take half of its calls.
            ("grpc.so_reuseport", 0),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", _MIN_PING_INTERVAL_MS),
        ],
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, _handlers(gateway)),))
    try:
        server.add_insecure_port(address)
    except RuntimeError:
        raise BadInput(
            "gRPC can't listen there", got=address, allowed="a free port", fix="choose another --grpc-port"
        ) from None
    await server.start()
    return server


def _handlers(gateway: Gateway) -> dict[str, grpc.RpcMethodHandler[bytes, bytes]]:
    read_s = BODY_GRACE_S + gateway.max_message_bytes / BODY_MIN_BYTES_PER_S
    # Whoever probes has no key, as in HTTP; the rest is asked for it by the replica, or here, if it is long.
    unary: dict[str, tuple[Method, bool]] = {
        "ServerLive": (gateway.server_live, False),
        "ServerReady": (gateway.server_ready, False),
        "ServerMetadata": (gateway.server_metadata, True),
        "ModelReady": (gateway.model_ready, False),
        "ModelMetadata": (gateway.model_metadata, True),
        "ModelInfer": (gateway.model_infer, True),
    }
    handlers = {
        name: grpc.stream_unary_rpc_method_handler(_unary(gateway, method, guarded, read_s))
        for name, (method, guarded) in unary.items()
    }
    return handlers | {"ModelStreamInfer": grpc.stream_stream_rpc_method_handler(_stream(gateway))}


def _unary(gateway: Gateway, method: Method, guarded: bool, read_s: float) -> Any:
    async def answer(messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        call = _call(context)
        try:
            with gateway.admit(call) if guarded else nullcontext():
                response, metadata = await method(call, await _first(messages, read_s))
        except Exception as error:  # noqa: BLE001 - every error becomes a status
            refusal = _refusal(error, call)
            await context.abort(refusal.code, refusal.details, refusal.metadata)
        context.set_trailing_metadata(metadata)
        return bytes(response.SerializeToString())

    return answer


def _stream(gateway: Gateway) -> Any:
    """Each request of a stream is answered before the next one is read, so answers come in order."""

    async def answers(
        messages: AsyncIterator[bytes], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[bytes]:
        async for message in messages:
            call = _call(context)
            try:
                with gateway.admit(call):
                    found, _ = await gateway.model_infer(call, message)
                response = ModelStreamInferResponse(infer_response=found)
            except Exception as error:  # noqa: BLE001 - every error becomes an answer of the stream
                response = ModelStreamInferResponse(error_message=_refusal(error, call).details)
            yield response.SerializeToString()

    return answers


def _call(context: grpc.aio.ServicerContext) -> Call:
    metadata = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
    remaining_s = context.time_remaining()
    return Call(metadata, remaining_s if remaining_s is not None and remaining_s < _NO_DEADLINE_S else None)


async def _first(messages: AsyncIterator[bytes], within_s: float) -> bytes:
    try:
        async with asyncio.timeout(within_s):
            async for message in messages:
                return message
    except TimeoutError:
        raise TooSlow(
            "the message did not arrive in time", allowed=f"{within_s:.0f} s", fix="send smaller requests"
        ) from None
    raise BadRequest("the call has no message", allowed="one message")


def _refusal(error: Exception, call: Call) -> Refused:
    return error if isinstance(error, Refused) else refused(explain(error, call), call.id)
