"""gRPC with the unmodified tritonclient: two models behind one port, keys, a swap, the end. One Ray."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from servables import LABELS, MLP, publish, publish_mlp, slow_graph
from serving_process import ServiceProcess, processes_marked, serving, wait_until
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from cluster.keys import Keys
from cluster.storage import Store, open_store

MAX_BODY_BYTES = 100_000
WITHIN_S = 30


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = open_store(str(tmp_path_factory.mktemp("store")))
    publish_mlp(made, "digits", favourite=1)
    publish(made, "slow", slow_graph(), MLP)
    return made


@pytest.fixture(scope="module")
def key(store: Store) -> dict[str, str]:
    return {"authorization": f"Bearer {Keys(store).create('team').text}"}


@pytest.fixture(scope="module")
def service(
    store: Store, key: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    models = [
        {
            "model": "digits@live",
            "replicas": {"min": 2, "max": 2, "cpus": 0.1},
            "max_body_bytes": MAX_BODY_BYTES,
        },
        {
            "model": "slow@live",
            "replicas": {"cpus": 0.1},
            "max_batch_size": 8,
            "max_queue_rows": 512,
            "slo_ms": 15_000,
            "max_body_bytes": MAX_BODY_BYTES,
        },
    ]
    file = {"store": store.uri, "models": models, "keys": "required", "follow_every_s": 0.2}
    with serving(file, tmp_path_factory.mktemp("service"), "--grpc-port", "0") as running:
        yield running


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[triton.InferenceServerClient]:
    with contextlib.closing(triton.InferenceServerClient(service.grpc_url)) as made:
        yield made


@pytest.fixture
def stub(service: ServiceProcess) -> Iterator[Any]:
    """What the protocol's own generated code gives, for what tritonclient doesn't show."""
    with grpc.insecure_channel(str(service.grpc_url)) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def zeros(rows: int = 1, columns: int = 64) -> triton.InferInput:
    item = triton.InferInput("x", [rows, columns], "FP32")
    return item.set_data_from_numpy(np.zeros((rows, columns), np.float32))


def typed(model: str = "digits", rows: int = 1) -> Any:
    tensor = {
        "name": "x",
        "datatype": "FP32",
        "shape": [rows, 64],
        "contents": {"fp32_contents": [0] * 64 * rows},
    }
    return service_pb2.ModelInferRequest(model_name=model, inputs=[tensor])


def status(error: BaseException | None) -> str:
    return (
        str(error.status()).removeprefix("StatusCode.") if isinstance(error, InferenceServerException) else ""
    )


def test_health_needs_no_key_and_metadata_does(
    client: triton.InferenceServerClient, key: dict[str, str]
) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert client.is_model_ready("slow", "1")
    server = client.get_server_metadata(key)
    assert (server.name, list(server.extensions)) == ("tandem", ["binary_tensor_data"])
    model = client.get_model_metadata("digits", headers=key)
    assert (list(model.versions), model.platform, list(model.inputs[0].shape)) == (["1"], "onnx", [-1, 64])
    with pytest.raises(InferenceServerException, match="a key is needed") as caught:
        client.get_model_metadata("digits")
    assert status(caught.value) == "UNAUTHENTICATED"


def test_a_caller_without_a_key_is_refused_before_it_has_sent_anything(service: ServiceProcess) -> None:
    sent = threading.Event()

    def messages() -> Iterator[bytes]:
        sent.wait(WITHIN_S)
        yield b""

    with grpc.insecure_channel(str(service.grpc_url)) as channel:
        ask = channel.stream_unary("/inference.GRPCInferenceService/ModelInfer")
        call = ask.future(messages(), timeout=WITHIN_S)
        try:
            assert call.code() == grpc.StatusCode.UNAUTHENTICATED
            assert not sent.is_set()
        finally:
            sent.set()


def test_both_models_answer_raw_and_typed_tensors(
    client: triton.InferenceServerClient, stub: Any, key: dict[str, str]
) -> None:
    wanted = [triton.InferRequestedOutput("label")]
    for model in ("digits", "slow"):
        result = client.infer(model, [zeros(3)], outputs=wanted, request_id="r-1", headers=key)
        assert len(result.as_numpy("label")) == 3
        assert result.as_numpy("probabilities") is None
        assert (result.get_response().model_name, result.get_response().id) == (model, "r-1")
    metadata = (*key.items(), ("x-request-id", "mine-1"))
    answer, call = stub.ModelInfer.with_call(typed(rows=2), metadata=metadata)
    result = triton.InferResult(answer)
    assert result.as_numpy("label").tolist() == [LABELS[1].encode()] * 2
    np.testing.assert_allclose(result.as_numpy("probabilities").sum(axis=1), 1, rtol=1e-5)
    told = dict(call.trailing_metadata())
    assert (told["x-request-id"], told["x-model-version"]) == ("mine-1", "1")


BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("NOT_FOUND", "no such model is served; got: 'nope'; allowed: digits, slow", {"model_name": "nope"}),
    ("NOT_FOUND", "version '99' of model 'digits' is not in service", {"model_version": "99"}),
    ("INVALID_ARGUMENT", "another shape; got: .*; allowed: .*; fix: ", {"inputs": [zeros(1, 63)]}),
    ("INVALID_ARGUMENT", "the model has no such output", {"outputs": [triton.InferRequestedOutput("z")]}),
    ("INVALID_ARGUMENT", "the priority is none", {"priority": 9}),
    ("RESOURCE_EXHAUSTED", "the body is too large", {"inputs": [zeros(rows=400)]}),
    ("RESOURCE_EXHAUSTED", "message larger than max", {"inputs": [zeros(rows=4000)]}),
    ("UNAVAILABLE", "the request can't be answered in its time", {"model_name": "slow", "timeout": 1}),
]


@pytest.mark.parametrize(("code", "match", "asked"), BAD)
def test_a_refusal_says_why_and_the_next_good_request_works(
    client: triton.InferenceServerClient, key: dict[str, str], code: str, match: str, asked: dict[str, Any]
) -> None:
    good = {"model_name": "digits", "inputs": [zeros()], "headers": key}
    with pytest.raises(InferenceServerException, match=match) as caught:
        client.infer(**{**good, **asked})
    assert status(caught.value) == code
    assert "Traceback" not in str(caught.value)
    assert client.infer(**good).as_numpy("label").tolist() == [LABELS[1].encode()]


def test_methods_that_are_not_here(client: triton.InferenceServerClient, key: dict[str, str]) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.get_inference_statistics("digits", headers=key)
    assert status(caught.value) == "UNIMPLEMENTED"


def test_a_refusal_says_when_to_try_again(stub: Any, key: dict[str, str]) -> None:
    hasty = typed("slow")
    hasty.parameters["timeout"].int64_param = 1
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(hasty, metadata=tuple(key.items()))
    told = dict(caught.value.trailing_metadata())
    assert int(told["retry-after"]) >= 1
    assert int(told["grpc-retry-pushback-ms"]) >= 1000
    assert told["x-request-id"]


def test_a_deadline_that_cannot_be_met_is_refused(stub: Any, key: dict[str, str]) -> None:
    """By the replica, if its answer comes back in time; by gRPC itself, if not."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(typed("slow", rows=64), metadata=tuple(key.items()), timeout=0.02)
    assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def test_calls_that_are_cancelled_are_dropped_by_the_replica(
    service: ServiceProcess, stub: Any, key: dict[str, str]
) -> None:
    metadata = tuple(key.items())
    with service.client(headers=key) as client:

        def dropped() -> bool:
            calls = [stub.ModelInfer.future(typed("slow", rows=64), metadata=metadata) for _ in range(8)]
            wait_until(lambda: any(call.done() for call in calls), every_s=0.01)  # they have arrived
            for call in calls:
                call.cancel()
            lines = client.get("/metrics").text.splitlines()
            found = [line for line in lines if line.startswith("tandem_requests_total")]
            return any('model="slow"' in line and 'status="499"' in line for line in found)

        wait_until(dropped)


def test_a_stream_answers_in_order_and_goes_on_after_an_error(
    client: triton.InferenceServerClient, key: dict[str, str]
) -> None:
    answers: list[tuple[Any, Any]] = []
    client.start_stream(lambda result, error: answers.append((result, error)), headers=key)
    for columns in (64, 63, 64):
        client.async_stream_infer("digits", [zeros(1, columns)])
    client.stop_stream()  # waits for the answers
    assert [error is None for _, error in answers] == [True, False, True]
    assert "another shape" in str(answers[1][1])


def test_an_alias_swaps_under_load_without_a_failure(
    client: triton.InferenceServerClient, store: Store, key: dict[str, str]
) -> None:
    seen: list[tuple[str, bytes]] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            result = client.infer("digits", [zeros()], headers=key)
            seen.append((result.get_response().model_version, result.as_numpy("label")[0]))

    with ThreadPoolExecutor(4) as pool:
        loaders = [pool.submit(load) for _ in range(4)]
        try:
            wait_until(lambda: len(seen) > 40)
            publish_mlp(store, "digits", favourite=2)
            wait_until(lambda: all(version == "2" for version, _ in seen[-40:]))
        finally:
            stop.set()
        for loader in loaders:
            loader.result()
    assert set(seen) == {("1", LABELS[1].encode()), ("2", LABELS[2].encode())}


def test_sigterm_answers_what_was_accepted(service: ServiceProcess, stub: Any, key: dict[str, str]) -> None:
    """The last test: the service has gone after it."""
    calls = [stub.ModelInfer.future(typed("slow", rows=40), metadata=tuple(key.items())) for _ in range(6)]
    wait_until(lambda: any(call.done() for call in calls))
    assert not all(call.done() for call in calls), "nothing was in flight any more"
    assert service.stop() == 0
    assert {call.code() for call in calls} == {grpc.StatusCode.OK}
    wait_until(lambda: processes_marked(service.mark) == [], within_s=10)
