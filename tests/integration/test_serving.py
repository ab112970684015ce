"""Serving over real HTTP: HAProxy, replicas, the registry in a directory. One Ray for the module."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
from servables import GATHER, LABELS, MLP, TABLE, gather_graph, publish, publish_mlp, slow_graph, table_graph
from serving_process import ServiceProcess, processes_marked, serving, wait_until

from cluster.errors import BadInput
from cluster.keys import Keys
from cluster.registry import Registry
from cluster.storage import Store, open_store
from cluster.trial import Rules
from cluster.trials import begin
from serving.simulator.measure import measure

ZEROS = [0.0] * 64


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    made = open_store(str(tmp_path_factory.mktemp("store")))
    publish_mlp(made, "digits", favourite=1)
    publish(made, "look-up", gather_graph(), GATHER)
    publish(made, "slow", slow_graph(), MLP)
    publish(made, "table", table_graph(), TABLE)
    publish_mlp(made, "tried", favourite=1)
    return made


@pytest.fixture(scope="module")
def service(store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    few = {"min": 1, "max": 1, "cpus": 0.1}
    models = [
        {"model": "digits@live", "replicas": {**few, "min": 2, "max": 2}, "max_body_bytes": 100_000},
        {"model": "look-up@live", "replicas": few},
        {
            "model": "slow@live",
            "replicas": few,
            "max_batch_size": 8,
            "max_queue_rows": 64,
            "slo_ms": 10_000,
        },
        {"model": "table@live", "replicas": few},
        {"model": "tried@live", "replicas": {**few, "min": 2, "max": 2}},
    ]
    file = {"store": store.uri, "models": models, "follow_every_s": 0.2}
    with serving(file, tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[httpx.Client]:
    with service.client() as made:
        yield made


def predict(client: httpx.Client, model: str = "digits", instances: Any = None) -> httpx.Response:
    return client.post(f"/v1/models/{model}:predict", json={"instances": instances or [ZEROS]})


def oip(name: str, datatype: str, data: list[Any], row_shape: tuple[int, ...] = ()) -> dict[str, Any]:
    rows = len(data) // int(np.prod(row_shape, dtype=int))
    return {"inputs": [{"name": name, "datatype": datatype, "shape": [rows, *row_shape], "data": data}]}


def test_health_and_metadata(client: httpx.Client, service: ServiceProcess) -> None:
    assert client.get("/v2/health/live").status_code == 200
    assert client.get("/v2/health/ready").status_code == 200
    assert client.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    metadata = client.get("/v2/models/digits").json()
    assert (metadata["name"], metadata["versions"], metadata["platform"]) == ("digits", ["1"], "onnx")
    assert client.get("/v2/models/digits/ready").status_code == 200
    assert client.get("/v2/models/digits/versions/1/ready").status_code == 200
    assert {model["model"] for model in service.models} == {"digits", "look-up", "slow", "table", "tried"}
    document = client.get("/openapi.json").json()
    assert "/v2/models/table/infer" in document["paths"]


def test_infer_in_json_and_predict_agree(client: httpx.Client) -> None:
    answer = client.post("/v2/models/digits/infer", json=oip("x", "FP32", ZEROS * 3, (64,)))
    assert answer.status_code == 200
    outputs = {output["name"]: output for output in answer.json()["outputs"]}
    assert outputs["label"]["data"] == [LABELS[1]] * 3
    assert answer.headers["x-model-version"] == "1"
    plain = predict(client, instances=[ZEROS]).json()
    assert (plain["model"], plain["version"]) == ("digits", "1")
    assert plain["predictions"][0]["label"] == LABELS[1]


def test_strings_and_missing_values(client: httpx.Client) -> None:
    instances = [{"age": 20, "city": "Paris"}, {"age": None, "city": "Rome"}, {"age": 1.5, "city": None}]
    answer = predict(client, "table", instances)
    assert answer.status_code == 200, answer.text
    assert [p["value"] if isinstance(p, dict) else p for p in answer.json()["predictions"]] == [120, 0, 1.5]


def test_the_unmodified_triton_client(service: ServiceProcess) -> None:
    import tritonclient.http as triton

    with contextlib.closing(triton.InferenceServerClient(urlsplit(service.url).netloc)) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("digits")
        assert client.get_server_metadata()["name"] == "tandem"
        assert client.get_model_metadata("digits")["inputs"][0]["shape"] == [-1, 64]
        x_BF = np.zeros((5, 64), np.float32)
        for binary in (True, False):
            asked = triton.InferInput("x", list(x_BF.shape), "FP32")
            asked.set_data_from_numpy(x_BF, binary_data=binary)
            wanted = [triton.InferRequestedOutput(n, binary_data=binary) for n in ("label", "probabilities")]
            result = client.infer("digits", [asked], outputs=wanted, request_id="r-1")
            labels = [v.decode() if isinstance(v, bytes) else v for v in result.as_numpy("label")]
            assert labels == [LABELS[1]] * 5
            np.testing.assert_allclose(result.as_numpy("probabilities").sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("abc-1._Z", True), ("a b", False), ("é".encode(), False), ("x" * 129, False), ("x" * 128, True)],
)
def test_request_ids(client: httpx.Client, given: str | bytes, kept: bool) -> None:
    for path in ("/v2/models/digits/ready", "/v2"):
        answer = client.get(path, headers={"x-request-id": given})
        (id_given,) = answer.headers.get_list("x-request-id")
        assert (id_given == given) == kept
        assert id_given


def test_a_version_that_is_not_in_service(client: httpx.Client) -> None:
    answer = client.post("/v2/models/digits/versions/99/infer", json={})
    assert answer.status_code == 404
    assert "'99'" in answer.json()["error"]
    assert answer.json()["details"]["allowed"] == "1"


BAD = [
    ("POST", "/v2/models/digits/infer", b"{", 400),
    ("POST", "/v2/models/digits/infer", b"", 400),
    ("POST", "/v2/models/digits/infer", b"[" * 200_00, 400),
    ("POST", "/v2/models/digits/infer", b"\xff\xfe", 400),
    ("POST", "/v2/models/digits/infer", json.dumps(oip("x", "BYTES", ["1"] * 64, (64,))).encode(), 422),
    ("POST", "/v2/models/digits/infer", json.dumps(oip("y", "FP32", ZEROS, (64,))).encode(), 422),
    ("POST", "/v2/models/digits/infer", json.dumps(oip("x", "FP32", ZEROS[:63], (63,))).encode(), 422),
    ("POST", "/v1/models/digits:predict", b'{"instances": [[1,2]]}', 422),
    ("POST", "/v1/models/digits:predict", b'{"instances": 1}', (400, 422)),
    ("POST", "/v1/models/digits:predict", b"x" * 100_001, 413),
    ("POST", "/v2/models/nope/infer", b"{}", 404),
    ("POST", "/v1/models/nope:predict", b"{}", 404),
    ("POST", "/v1/models/..%2fdigits:predict", b"{}", 404),
    ("POST", "/v2/models/%2e%2e/infer", b"{}", 404),
    ("POST", "/v2/models/a%00b/infer", b"{}", (400, 404)),
    ("POST", "/v2/models/" + "n" * 4000 + "/infer", b"{}", 404),
    ("GET", "/v2/models/digits/infer", b"", 405),
    ("POST", "/v2/models/digits", b"", 405),
    ("DELETE", "/v2", b"", 405),
    ("GET", "/nowhere", b"", 404),
]


@pytest.mark.parametrize(("method", "path", "body", "status"), BAD)
def test_bad_requests_are_told_why_and_the_next_good_one_works(
    client: httpx.Client, method: str, path: str, body: bytes, status: int | tuple[int, ...]
) -> None:
    answer = client.request(method, path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (status if isinstance(status, tuple) else (status,)), answer.text
    assert answer.headers["x-request-id"]
    if answer.status_code != 400 or b"%00" not in path.encode():
        assert answer.json()["error"]
    assert predict(client).status_code == 200


def test_an_announced_gigabyte_is_refused_before_it_is_sent(service: ServiceProcess) -> None:
    parts = urlsplit(service.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as connection:
        head = "POST /v1/models/digits:predict HTTP/1.1\r\nhost: x\r\ncontent-length: 1073741824\r\n\r\n{"
        connection.sendall(head.encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_poisoned_request_fails_alone(client: httpx.Client) -> None:
    """Index 99 makes the graph raise, whatever batch it is in."""

    def ask(index: int) -> tuple[int, Any]:
        answer = client.post("/v2/models/look-up/infer", json=oip("index", "INT64", [index]))
        return answer.status_code, answer.json()

    indices = [n % 8 for n in range(60)]
    indices[::10] = [99] * 6
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, indices))
    for index, (status, answer) in zip(indices, answers, strict=True):
        if index == 99:
            assert status == 500
            assert "request_id" in answer
        else:
            assert status == 200
            assert answer["outputs"][0]["data"] == [10.0 * index]


def test_a_request_larger_than_a_batch_is_answered_whole(client: httpx.Client) -> None:
    indices = [n % 8 for n in range(500)]
    answer = client.post("/v2/models/look-up/infer", json=oip("index", "INT64", indices))
    assert answer.json()["outputs"][0]["data"] == [10.0 * n for n in indices]


def test_overload_is_shed_with_retry_after_and_passes(service: ServiceProcess) -> None:
    rows = [ZEROS] * 8
    refused: list[httpx.Response] = []
    statuses: list[int] = []

    def ask(client: httpx.Client) -> None:
        answer = predict(client, "slow", rows)
        statuses.append(answer.status_code)
        if answer.status_code == 503:
            refused.append(answer)

    limits = httpx.Limits(max_connections=64)
    with service.client(limits=limits) as client:
        with ThreadPoolExecutor(48) as pool:
            for _ in range(96):
                pool.submit(ask, client)
        assert set(statuses) <= {200, 503, 504}
        assert refused, "48 requests of 8 rows at once, and none of a queue of 64 rows was refused"
        assert 200 in statuses
        for answer in refused:
            assert int(answer.headers["retry-after"]) >= 1
            assert answer.json()["error"].startswith(("the queue is full", "the request can't be answered"))
        assert predict(client, "slow", rows).status_code == 200


def test_a_client_may_ask_for_less_time(service: ServiceProcess) -> None:
    with service.client() as client, ThreadPoolExecutor(8) as pool:
        busy = [pool.submit(predict, client, "slow", [ZEROS] * 8) for _ in range(7)]
        time.sleep(0.05)
        hasty = client.post(
            "/v1/models/slow:predict",
            json={"instances": [ZEROS]},
            headers={"x-request-timeout-seconds": "0.001"},
        )
        assert {future.result().status_code for future in busy} == {200}
    assert hasty.status_code == 503  # refused at once: not even an idle model could


def test_an_alias_swaps_under_load_without_a_failure(service: ServiceProcess, store: Store) -> None:
    """Version n answers LABELS[n]; no answer may mix one version's header with another's label."""
    registry = Registry(store)
    stop = threading.Event()
    seen: list[tuple[str, str]] = []
    failures: list[str] = []

    def load() -> None:
        with service.client() as client:
            while not stop.is_set():
                answer = predict(client)
                if answer.status_code != 200:
                    failures.append(answer.text)
                    continue
                body = answer.json()
                if body["version"] != answer.headers["x-model-version"]:
                    failures.append("two versions in one answer")
                seen.append((body["version"], body["predictions"][0]["label"]))

    with ThreadPoolExecutor(6) as pool:
        loaders = [pool.submit(load) for _ in range(6)]
        try:
            # The load must have met version 1 before there is another one to meet.
            wait_until(lambda: len(seen) > 40)
            for favourite in (2, 3):
                version = publish_mlp(store, "digits", favourite)
                wait_until(lambda v=str(version.version): all(s[0] == v for s in seen[-40:]))
            registry.rollback("digits", "live", why="test")
            wait_until(lambda: all(s[0] == "2" for s in seen[-40:]))
        finally:
            stop.set()
        for loader in loaders:
            loader.result()
    assert failures == []
    assert set(seen) == {("1", LABELS[1]), ("2", LABELS[2]), ("3", LABELS[3])}


def test_a_version_that_cannot_be_loaded_leaves_the_old_one_serving(
    client: httpx.Client, store: Store
) -> None:
    before = client.get("/v2/models/table").json()["versions"]
    publish(store, "table", b"not a graph", TABLE)
    publish(store, "table", gather_graph(), TABLE)  # a graph, but another one than its signature says
    time.sleep(1.5)
    answer = predict(client, "table", [{"age": 1, "city": "Paris"}])
    assert (answer.status_code, answer.headers["x-model-version"]) == (200, before[0])
    wait_until(lambda: _sample(client, "tandem_load_failures_total", 'model="table"') >= 1)
    publish(store, "table", table_graph(), TABLE)
    wait_until(lambda: predict(client, "table", [{"age": 1, "city": "x"}]).headers["x-model-version"] == "4")


def test_a_bad_candidate_is_abandoned_and_a_good_one_promoted(client: httpx.Client, store: Store) -> None:
    """By the replicas themselves, on what they see of it; a caller notices the bad one in nothing."""
    registry = Registry(store)
    answers: list[httpx.Response] = []

    def settled(action: str) -> bool:
        answers.extend(predict(client, "tried") for _ in range(20))
        newest = registry.newest("tried")
        return newest is not None and newest.action == action

    publish(store, "tried", gather_graph(), GATHER, alias=None)
    begin(registry, "tried", "live", 2, mode="canary", steps=(20,), why="test")
    wait_until(lambda: settled("abandon"))
    assert {(a.status_code, a.headers["x-model-version"]) for a in answers} == {(200, "1")}

    answers.clear()
    publish_mlp(store, "tried", favourite=3, alias=None)
    rules = Rules(hold_s=1, least_requests=40, latency_ratio=1000)
    begin(registry, "tried", "live", 3, mode="canary", steps=(20, 50), rules=rules, why="test")
    wait_until(lambda: settled("promote"))
    wait_until(lambda: predict(client, "tried").headers["x-model-version"] == "3")
    assert {a.status_code for a in answers} == {200}
    labels = {(a.json()["version"], a.json()["predictions"][0]["label"]) for a in answers}
    assert labels <= {("1", LABELS[1]), ("3", LABELS[3])}
    told = client.post("/v1/models/tried:feedback", json={"version": "3", "score": 1})
    assert (told.status_code, told.json()) == (202, {"counted": 1})


def test_metrics_add_up_over_all_replicas(client: httpx.Client) -> None:
    before = _sample(client, "tandem_requests_total", 'model="digits"', 'route="infer"', 'status="200"')
    for _ in range(20):
        assert client.post("/v2/models/digits/infer", json=oip("x", "FP32", ZEROS, (64,))).status_code == 200
    name = ("tandem_requests_total", 'model="digits"', 'route="infer"', 'status="200"')
    wait_until(lambda: _sample(client, *name) == before + 20)
    page = client.get("/metrics").text
    for family in ("tandem_batch_rows_bucket", "tandem_request_seconds_count", "tandem_queue_rows"):
        assert family in page
    assert page.count("# TYPE tandem_requests_total") == 1


def test_a_client_that_goes_away_frees_its_place(service: ServiceProcess) -> None:
    parts = urlsplit(service.url)
    body = json.dumps({"instances": [ZEROS] * 8}).encode()
    head = f"POST /v1/models/slow:predict HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    connections = [socket.create_connection((parts.hostname, parts.port)) for _ in range(8)]
    for connection in connections:
        connection.sendall(head + body)
    time.sleep(0.3)
    for connection in connections:
        connection.close()
    with service.client() as client:
        wait_until(lambda: predict(client, "slow", [ZEROS] * 8).status_code == 200, within_s=10)


def test_sigterm_answers_what_was_accepted_and_leaves_no_process(store: Store, tmp_path: Path) -> None:
    """One model, so that its application stands at `/` itself; its callers need a key."""
    served = {"model": "slow@live", "max_batch_size": 8, "slo_ms": 15_000, "replicas": {"cpus": 0.1}}
    made = Keys(store).create("team")
    headers = {"authorization": f"Bearer {made.text}"}
    service = {"store": store.uri, "models": [served], "drain_s": 20, "keys": "required"}
    with serving(service, tmp_path) as running:
        assert running.models == [{"model": "slow", "alias": "live", "version": 1}]
        with running.client(headers=headers) as client, ThreadPoolExecutor(12) as pool:
            wait_until(lambda: predict(client, "slow").status_code == 200)
            assert httpx.get(f"{running.url}/metrics", trust_env=False).status_code == 401
            asked = [pool.submit(predict, client, "slow", [ZEROS] * 40) for _ in range(12)]
            time.sleep(0.2)
            assert not all(future.done() for future in asked), "nothing was in flight any more"
            assert running.stop() == 0
            assert {future.result().status_code for future in asked} == {200}
        wait_until(lambda: processes_marked(running.mark) == [], within_s=10)
        with pytest.raises(httpx.ConnectError):
            httpx.get(running.url, trust_env=False)


def test_the_ordinary_proxy(store: Store, tmp_path: Path) -> None:
    served = {"model": "look-up@live", "replicas": {"cpus": 0.1}}
    with (
        serving(
            {"store": store.uri, "models": [served]}, tmp_path, "--no-haproxy", "--grpc-port", "0"
        ) as running,
        running.client() as client,
        contextlib.closing(triton_grpc.InferenceServerClient(running.grpc_url)) as by_grpc,
    ):
        asked = triton_grpc.InferInput("index", [1], "INT64").set_data_from_numpy(np.array([3]))
        assert by_grpc.infer("look-up", [asked]).as_numpy("value").tolist() == [30.0]
        answer = client.post(
            "/v2/models/look-up/infer", json=oip("index", "INT64", [3, 99]), headers={"x-request-id": "a b"}
        )
        assert answer.status_code == 500
        assert len(answer.headers.get_list("x-request-id")) == 1
        answer = client.post("/v2/models/look-up/infer", json=oip("index", "INT64", [3]))
        assert (answer.status_code, answer.json()["outputs"][0]["data"]) == (200, [30.0])
        assert client.post("/v1/models/look-up:predict", content=b"{").status_code == 400
        wait_until(lambda: "tandem_requests_total" in client.get("/metrics").text)


def test_a_model_that_does_not_exist_is_said_before_anything_starts(store: Store, tmp_path: Path) -> None:
    from cluster.errors import NotFound
    from serving.run import run_service
    from serving.service import Service

    service = Service.model_validate({"store": store.uri, "models": [{"model": "nothing@live"}]})
    with pytest.raises(NotFound, match="no model 'nothing'"):
        run_service(service, address=None)


def _sample(client: httpx.Client, name: str, *labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    lines = client.get("/metrics").text.splitlines()
    found = [line for line in lines if line.startswith(name + "{") and all(label in line for label in labels)]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def test_a_live_service_is_measured_for_the_simulator(service: ServiceProcess) -> None:
    found = measure(service.url, "slow", max_batch=8, each_s=0.5)
    assert found.base_s + found.row_s > 0
    assert found.answered_rows_s > 0
    with pytest.raises(BadInput, match="which model"):
        measure(service.url, None, max_batch=8)
