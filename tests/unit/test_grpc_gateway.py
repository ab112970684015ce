"""What a call becomes for the ingress, and what becomes of the ingress's answer."""

import asyncio
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import grpc
import numpy as np
import orjson
import pytest
from tritonclient import grpc as triton
from tritonclient.grpc._utils import _get_inference_request

from cluster.errors import NotFound, Overloaded, RateLimited, TandemError, Unauthorized
from serving.grpc.gateway import Call, Gateway, explain
from serving.grpc.messages import ModelReadyRequest
from serving.grpc.refusals import Answer, Refused, refused
from serving.guard import Guard
from serving.service import Service

SERVICE = Service.model_validate(
    {"store": "file:///nowhere", "models": [{"model": "a@live", "max_body_bytes": 2000}, {"model": "b@live"}]}
)
ANSWER = orjson.dumps({"model_name": "a", "model_version": "1", "outputs": []})


class Answering:
    """An ingress that gives one answer, and remembers what it was asked."""

    def __init__(self, status: int = 200, body: bytes = ANSWER, headers: Mapping[bytes, bytes] | None = None):
        self.answer = Answer(status, headers or {}, body)
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.wait: asyncio.Event | None = None

    async def ask(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Answer:
        self.asked.append((method, path, dict(headers)))
        if self.wait is not None:
            await self.wait.wait()
        return self.answer


def gateway(ingress: Any, guard: Guard | None = None) -> Gateway:
    return Gateway(SERVICE, ingress, guard)


def infer_message(model: str = "a", version: str = "", floats: int = 4) -> bytes:
    item = triton.InferInput("x", [1, floats], "FP32")
    item.set_data_from_numpy(np.zeros((1, floats), np.float32))
    made = _get_inference_request(model, [item], version, "", None, 0, False, False, 0, None, None)
    return bytes(made.SerializeToString())


def test_only_known_metadata_is_passed_on_and_the_shorter_time_counts() -> None:
    given = {"x-api-key": "k", "host": "evil", "transfer-encoding": "chunked", "x-request-id": "r-1"}
    call = Call({**given, "x-request-timeout-seconds": "3"}, 0.25)
    assert call.passed_on == {
        "x-api-key": "k",
        "x-request-id": "r-1",
        "x-request-timeout-seconds": "0.250000",
    }
    assert Call({"x-request-timeout-seconds": "0.1"}, 5).passed_on["x-request-timeout-seconds"] == "0.100000"
    for junk in ("nan", "-1", "inf", "x" * 99):
        assert "x-request-timeout-seconds" not in Call({"x-request-timeout-seconds": junk}, None).passed_on
    assert Call({"x-request-id": "a b"}, None).id != "a b"


def test_the_path_is_made_of_known_names_only() -> None:
    ingress = Answering()
    asyncio.run(gateway(ingress).model_infer(Call({}, None), infer_message("a", "7")))
    assert ingress.asked[0][:2] == ("POST", "/v2/models/a/versions/7/infer")
    for model, version in (("c", ""), ("", ""), ("../b", ""), ("a", "../1"), ("a", ".."), ("a", "1/infer?x")):
        with pytest.raises(NotFound):
            asyncio.run(gateway(ingress).model_infer(Call({}, None), infer_message(model, version)))
    assert len(ingress.asked) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Unauthorized("no"), grpc.StatusCode.UNAUTHENTICATED),
        (NotFound("no"), grpc.StatusCode.NOT_FOUND),
        (Overloaded("no", retry_after_s=1.2), grpc.StatusCode.UNAVAILABLE),
        (RateLimited("no", retry_after_s=1.2), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (TandemError("no"), grpc.StatusCode.INTERNAL),
        (ValueError("secret"), grpc.StatusCode.INTERNAL),
    ],
)
def test_errors_become_statuses(error: Exception, code: grpc.StatusCode) -> None:
    call = Call({"x-request-id": "r-1"}, None)
    refusal = refused(explain(error, call), call.id)
    assert refusal.code == code
    assert "secret" not in refusal.details
    metadata = dict(refusal.metadata)
    assert metadata["x-request-id"] == "r-1"
    retry = (metadata.get("retry-after"), metadata.get("grpc-retry-pushback-ms"))
    assert retry == (("2", "2000") if hasattr(error, "retry_after_s") else (None, None))


def test_an_answer_in_the_ingress_own_words_is_unavailable() -> None:
    ingress = Answering(500, b"Internal Server Error")
    with pytest.raises(Refused) as caught:
        asyncio.run(gateway(ingress).model_infer(Call({}, None), infer_message()))
    assert caught.value.code == grpc.StatusCode.UNAVAILABLE


def test_a_model_that_is_not_ready_is_no_error() -> None:
    asked = ModelReadyRequest(name="a").SerializeToString()
    response, _ = asyncio.run(gateway(Answering(503)).model_ready(Call({}, None), asked))
    assert response.ready is False


def test_large_messages_together_have_an_end() -> None:
    """Four times the largest is held; memory is given back with the answer."""

    async def flood() -> int:
        ingress = Answering()
        ingress.wait = asyncio.Event()
        small = Gateway(
            SERVICE.model_copy(update={"models": SERVICE.models[:1]}),
            ingress,  # type: ignore[arg-type]
        )
        message = infer_message(floats=400) + b"\x1a\x00" * 30_000  # an empty id, again and again
        calls = [asyncio.ensure_future(small.model_infer(Call({}, None), message)) for _ in range(8)]
        await asyncio.sleep(0)
        ingress.wait.set()
        ended = await asyncio.gather(*calls, return_exceptions=True)
        await small.model_infer(Call({}, None), message)
        return sum(isinstance(end, Overloaded) for end in ended)

    assert asyncio.run(flood()) == 4


def test_the_guard_is_asked() -> None:
    with pytest.raises(Unauthorized), gateway(Answering(), Guard()).admit(Call({"x-api-key": "k"}, None)):
        pass
    assert isinstance(gateway(Answering()).admit(Call({}, None)), nullcontext)
