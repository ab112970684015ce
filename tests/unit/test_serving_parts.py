"""Small parts of serving: runtimes, layout, scaling, exposition, ingress settings, arguments."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from servables import GATHER, LABELS, MLP, TABLE, gather_graph, mlp_graph, publish, table_graph

from cluster.artifacts import Artifacts
from cluster.connection import Unreachable
from cluster.errors import BadInput, Damaged, TandemError
from cluster.names import ModelRef
from cluster.registry import Registry
from cluster.storage import memory_store, open_store
from serving.exposition import merge
from serving.http import Request
from serving.ingress import describe_exposure, free_ports, ingress_env
from serving.layout import applications
from serving.metrics import ReplicaMetrics
from serving.model_app import ModelApp
from serving.replica import Replica
from serving.run import run_service
from serving.runtimes import load_runtime
from serving.runtimes.onnx import OnnxRuntime
from serving.service import ServedModel, Service


def test_onnx_runs_batches_of_floats_and_strings() -> None:
    runtime = OnnxRuntime(mlp_graph(4), MLP, threads=1)
    outputs = runtime.run({"x": np.zeros((3, 64), np.float32)})
    assert outputs["label"].tolist() == [LABELS[4]] * 3
    assert outputs["probabilities"].dtype == np.float32
    table = OnnxRuntime(table_graph(), TABLE, threads=1)
    cities = np.array(["Paris", ""], dtype=object)
    values = table.run({"age": np.array([np.nan, 2], np.float32), "city": cities})["value"]
    assert values.tolist() == [100.0, 2.0]


@pytest.mark.parametrize(
    ("graph", "signature", "message"),
    [
        (b"", MLP, "can't be loaded"),
        (b"PK\x03\x04 a .pt file", MLP, "can't be loaded"),
        (gather_graph(), MLP, "has no input 'x'"),
        (gather_graph(), GATHER.model_copy(update={"outputs": MLP.outputs}), "has no output 'label'"),
    ],
)
def test_a_graph_that_isnt_what_its_signature_says(graph: bytes, signature: object, message: str) -> None:
    with pytest.raises(Damaged, match=message):
        OnnxRuntime(graph, signature, threads=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dtype": "FP64"}, "another type for input 'x'"), ({"shape": (-1, 63)}, "another shape for input 'x'")],
)
def test_types_and_shapes_are_compared(change: dict[str, object], message: str) -> None:
    tensor = MLP.inputs[0].model_copy(update=change)
    with pytest.raises(Damaged, match=message):
        OnnxRuntime(mlp_graph(0), MLP.model_copy(update={"inputs": (tensor,)}), threads=1)


def test_a_servable_of_another_runtime_is_refused() -> None:
    store = memory_store()
    publish(store, "m", mlp_graph(0), MLP)
    artifacts = Artifacts(store, "runs/test-m/servables", "servable")
    manifest = artifacts.read(1)
    assert load_runtime(store, manifest, MLP, threads=1).platform == "onnx"
    pickled = manifest.model_copy(update={"meta": {"runtime": "pickle"}})
    with pytest.raises(Damaged, match="runtime that isn't here"):
        load_runtime(store, pickled, MLP, threads=1)


def service(*models: str) -> Service:
    return Service.model_validate({"store": "/tmp/s", "models": [{"model": model} for model in models]})


def test_one_model_is_one_application_and_several_have_a_front() -> None:
    (only,) = applications(service("a@live"))
    assert (only.name, only.route_prefix, only.args.get("model")) == ("tandem", "/", None)
    *models, front = applications(service("a@live", "b@live"))
    assert [(m.route_prefix, m.args["model"]) for m in models] == [
        ("/v2/models/a", "a"),
        ("/v2/models/b", "b"),
    ]
    assert (front.route_prefix, "model" in front.args) == ("/", False)
    assert len({m.name for m in (*models, front)}) == 3
    assert all(Service.model_validate(m.args["service"]) == service("a@live", "b@live") for m in models)


def test_build_takes_what_the_layout_gives() -> None:
    from serving.app import build

    for application in applications(service("a@live", "b@7")):
        assert build(application.args) is not None


def test_pages_of_several_nodes_become_one() -> None:
    page = (
        "# HELP ray_tandem_requests_total Answers\n# TYPE ray_tandem_requests_total counter\n"
        'ray_tandem_requests_total{Component="core_worker",WorkerId="%s",model="m",otel_scope_name="x"} 1.0\n'
        "# HELP ray_node_cpu other\nray_node_cpu 3\n"
    )
    assert merge([page % "a", page % "b"]) == (
        "# HELP tandem_requests_total Answers\n# TYPE tandem_requests_total counter\n"
        'tandem_requests_total{WorkerId="a",model="m"} 1.0\n'
        'tandem_requests_total{WorkerId="b",model="m"} 1.0\n'
    )


def test_the_environment_of_two_services_doesnt_collide() -> None:
    one = ingress_env()
    assert one["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    ports = [value for name, value in one.items() if name.endswith("_PORT")]
    assert len(set(ports)) == len(ports) == 6
    assert "statistics" not in describe_exposure("127.0.0.1", one)
    assert "HTTP" not in describe_exposure("127.0.0.1", one)
    assert "statistics" in describe_exposure("0.0.0.0", ingress_env(loopback=False))
    assert "HTTP" in describe_exposure("0.0.0.0", ingress_env(haproxy=False))
    assert ingress_env(haproxy=False)["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert 20_000 <= free_ports(10) < 32_000


def test_haproxys_socket_fits_below_the_longest_temporary_folder() -> None:
    """Ray inserts its node's id; HAProxy refuses socket paths of more than 97 characters."""
    from cluster import local

    longest = "/" * local._MAX_TEMP_BASE_CHARS + "/tandem-12345678"
    folder, name = ingress_env()["RAY_SERVE_HAPROXY_SOCKET_PATH"].rsplit("/", 1)
    path = f"{folder.replace('{temp_dir}', longest)}/{'f' * 56}/{name}"
    assert len(path) <= 97


@pytest.mark.parametrize("path", ["/v1/models/m:predict", "/v2/models/m/infer"])
def test_a_compressed_body_is_refused_on_every_route(path: str) -> None:
    store = memory_store()
    publish(store, "m", mlp_graph(0), MLP)

    async def status() -> int:
        metrics = ReplicaMetrics("m")
        replica = Replica(ServedModel(model="m@live"), store, metrics)
        replica.start(replica.load(Registry(store).resolve(ModelRef("m", "live"))))
        app = ModelApp(replica, metrics, _nothing)
        message = {"type": "http.request", "body": b"\x1f\x8b", "more_body": False}

        async def receive() -> dict[str, Any]:
            return message

        headers = {b"content-type": b"application/json", b"content-encoding": b"gzip"}
        try:
            return (await app.respond_to(Request("POST", path, headers, "1", receive))).status
        finally:
            await replica.stop()

    assert asyncio.run(status()) == 415


async def _nothing() -> bytes:
    return b""


@pytest.mark.parametrize(("address", "error"), [("foo", BadInput), ("127.0.0.1:1", Unreachable)])
def test_a_wrong_address_is_told_before_ray_is_asked(
    tmp_path: Path, address: str, error: type[TandemError]
) -> None:
    store = open_store(str(tmp_path))
    publish(store, "m", mlp_graph(0), MLP)
    service = Service.model_validate({"store": store.uri, "models": [{"model": "m@live"}]})
    with pytest.raises(error) as caught:
        run_service(service, address=address)
    assert caught.value.fix
