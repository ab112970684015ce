"""A service with a pool over real HTTP: more models than fit, beside one that has replicas of its own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import onnx
import pytest
from servables import GATHER, LABELS, MLP, gather_graph, mlp_graph, publish, slow_graph
from serving_process import ServiceProcess, serving, wait_until

from cluster.registry import Registry, Version
from cluster.storage import Store, open_store
from serving.pool.size import files_bytes

NAMES = ("a", "b", "c", "d")
ZEROS = [0.0] * 64


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return open_store(str(tmp_path_factory.mktemp("store")))


def publish_large(store: Store, name: str, favourite: int) -> Version:
    """An MLP in a file as large as `slow`'s."""
    model = onnx.load_from_string(mlp_graph(favourite))
    model.doc_string = "." * len(slow_graph())
    return publish(store, name, model.SerializeToString(), MLP)


@pytest.fixture(scope="module")
def limit_bytes(store: Store) -> int:
    """Room for two of the models."""
    versions = [publish_large(store, name, favourite) for favourite, name in enumerate(NAMES)]
    versions.append(publish(store, "slow", slow_graph(), MLP))
    publish(store, "apart", gather_graph(), GATHER)
    publish(store, "broken", b"not a graph", MLP)
    registry = Registry(store)
    return int(2.5 * max(files_bytes(registry.servable(version)[0]) for version in versions))


@pytest.fixture(scope="module")
def service(
    store: Store, limit_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    pooled = [
        {"model": f"{name}@live", "pooled": True, "slo_ms": 15_000} for name in (*NAMES, "slow", "broken")
    ]
    file = {
        "store": store.uri,
        "models": [*pooled, {"model": "apart@live", "replicas": {"cpus": 0.1}}],
        "pool": {"memory_gib": limit_bytes / 2**30, "replicas": {"cpus": 0.5}},
        "follow_every_s": 0.2,
    }
    with serving(file, tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[httpx.Client]:
    with service.client() as made:
        yield made


def label(client: httpx.Client, name: str) -> str:
    answer = client.post(f"/v1/models/{name}:predict", json={"instances": [ZEROS]})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["predictions"][0]["label"])


def test_a_user_cannot_tell_which_models_are_pooled(client: httpx.Client) -> None:
    assert client.get("/v2/health/ready").status_code == 200
    paths = client.get("/openapi.json").json()["paths"]
    for name in (*NAMES, "apart"):
        assert client.get(f"/v2/models/{name}/ready").status_code == 200
        assert client.get(f"/v2/models/{name}").json()["versions"] == ["1"]
        assert f"/v2/models/{name}/infer" in paths
    index = {"inputs": [{"name": "index", "datatype": "INT64", "shape": [1], "data": [3]}]}
    assert client.post("/v2/models/apart/infer", json=index).json()["outputs"][0]["data"] == [30.0]
    assert client.post("/v1/models/apart:predict", json={"instances": [3]}).status_code == 200
    x = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 64], "data": ZEROS}]}
    answer = client.post("/v2/models/a/infer", json=x)
    assert (answer.status_code, answer.headers["x-model-version"]) == (200, "1")
    assert client.post("/v2/models/nope/infer", json=x).status_code == 404
    assert client.post("/v1/models/a:predict", content=b"{").status_code == 400


def test_more_models_than_fit_in_turn_and_at_once(
    service: ServiceProcess, client: httpx.Client, limit_bytes: int
) -> None:
    asked = [name for _ in range(3) for name in NAMES]
    assert [label(client, name) for name in asked] == [LABELS[NAMES.index(name)] for name in asked]
    many = [NAMES[n % 4] for n in range(80)]
    with service.client() as shared, ThreadPoolExecutor(8) as pool:
        labels = list(pool.map(lambda name: label(shared, name), many))
    assert labels == [LABELS[NAMES.index(name)] for name in many]
    wait_until(lambda: sum(_samples(client, "tandem_pool_evictions_total").values()) >= len(asked) - 3)
    wait_until(lambda: 0 < sum(_samples(client, "tandem_pool_bytes").values()) <= limit_bytes)
    assert sum(_samples(client, "tandem_pool_loaded").values()) <= 2


def test_a_model_in_use_is_not_evicted(service: ServiceProcess, client: httpx.Client) -> None:
    """One long request, and others that want the room: were it evicted, it would be loaded twice."""
    label(client, "slow")
    with service.client() as own, ThreadPoolExecutor(1) as pool:
        path, instances = "/v1/models/slow:predict", [ZEROS] * 1000
        long = pool.submit(own.post, path, json={"instances": instances})
        answered = 0
        while not long.done():
            name = NAMES[answered % len(NAMES)]
            assert label(client, name) == LABELS[NAMES.index(name)]
            answered += 1
    assert answered
    assert long.result().status_code == 200, long.result().text
    assert len(long.result().json()["predictions"]) == 1000
    wait_until(lambda: _samples(client, "tandem_load_seconds_count").get("slow", 0) >= 1)
    assert _samples(client, "tandem_load_seconds_count")["slow"] == 1


def test_an_alias_that_moved_while_its_model_was_evicted(client: httpx.Client, store: Store) -> None:
    for name in NAMES:
        label(client, name)  # the last of which evict the first
    publish_large(store, "a", favourite=9)
    assert label(client, "a") == LABELS[9]


def test_a_model_that_cannot_be_loaded_is_alone_with_it(client: httpx.Client) -> None:
    answer = client.post("/v1/models/broken:predict", json={"instances": [ZEROS]})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert "'broken' can't be loaded" in answer.json()["error"]
    assert client.get("/v2/models/broken/ready").status_code == 503
    assert label(client, "b") == LABELS[1]


def _samples(client: httpx.Client, name: str) -> dict[str, float]:
    """A metric's samples by model."""
    found: dict[str, float] = {}
    for line in client.get("/metrics").text.splitlines():
        if line.startswith(name + "{"):
            model = line.partition('model="')[2].partition('"')[0]
            found[model] = found.get(model, 0) + float(line.rsplit(" ", 1)[1])
    return found
