"""A replica's pool with real graphs: loaded once for all who wait, evicted for others, its errors its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest
import yaml
from servables import LABELS, MLP, publish, publish_mlp

from cluster import trials
from cluster.config import parse_yaml
from cluster.errors import BadInput, TandemError
from cluster.registry import Registry
from cluster.storage import Store, memory_store
from serving.http import Request
from serving.load import Load
from serving.metrics import ReplicaMetrics
from serving.model_app import ModelApp
from serving.passing import given
from serving.pool.app import PoolApp
from serving.pool.load import summed
from serving.pool.pool import Pool
from serving.pool.size import check_fits, files_bytes
from serving.service import ServedModel, Service

NAMES = ("one", "two", "three")
SLO_S = 20.0


async def _nothing() -> Any:
    return b""


class Bench:
    """A pool with room for two of its models, and its application."""

    def __init__(self, store: Store, room: float = 2.5) -> None:
        self.store = store
        registry = Registry(store)
        models = [ServedModel(model=f"{name}@live", slo_ms=SLO_S * 1000) for name in NAMES]
        self.size = files_bytes(registry.servable(registry.resolve(models[0].ref))[0])
        metrics = [ReplicaMetrics(name) for name in NAMES]
        self.pool = Pool(models, metrics, store, limit_bytes=int(self.size * room), follow_every_s=0.01)
        self.app = PoolApp(
            self.pool,
            store,
            lambda replica: ModelApp(replica, replica.metrics, _nothing),
            describe_every_s=0,
            models={},
            not_ready=_nothing,
            signatures=_nothing,
            scrape=_nothing,
            max_body_bytes=1 << 20,
        )

    async def ask(self, method: str, path: str, body: bytes = b"", timeout_s: float = 0) -> tuple[int, Any]:
        headers = {b"x-request-timeout-seconds": str(timeout_s).encode()} if timeout_s else {}
        response = await self.app.respond_to(Request(method, path, headers, "1", given(body)))
        return response.status, orjson.loads(response.body or b"{}")

    async def predict(self, name: str, timeout_s: float = 0) -> tuple[int, Any]:
        body = orjson.dumps({"instances": [[0.0] * 64]})
        return await self.ask("POST", f"/v1/models/{name}:predict", body, timeout_s)

    async def label(self, name: str) -> str:
        status, body = await self.predict(name)
        assert status == 200, body
        return str(body["predictions"][0]["label"])

    def hot(self) -> set[str]:
        return {name for name, hosted in self.pool.hosted.items() if hosted.kept is not None}

    def counted(self, what: str) -> int:
        return sum(hosted.metrics._tally.counts[what, ()] for hosted in self.pool.hosted.values())


@pytest.fixture
def store() -> Store:
    made = memory_store()
    for favourite, name in enumerate(NAMES):
        publish_mlp(made, name, favourite)
    return made


def run(store: Store, test: Callable[[Bench], Awaitable[None]], **options: float) -> None:
    async def whole() -> None:
        bench = Bench(store, **options)
        try:
            async with asyncio.timeout(60):
                await test(bench)
        finally:
            await bench.pool.stop()

    asyncio.run(whole())


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not true():
            await asyncio.sleep(0.005)


def test_round_robin_over_more_models_than_fit(store: Store) -> None:
    async def test(bench: Bench) -> None:
        for _ in range(2):
            for favourite, name in enumerate(NAMES):
                assert await bench.label(name) == LABELS[favourite]
                assert bench.pool.budget.held_bytes <= bench.pool.budget.limit_bytes
        asked = [NAMES[n % 3] for n in range(60)]
        labels = await asyncio.gather(*(bench.label(name) for name in asked))
        assert labels == [LABELS[NAMES.index(name)] for name in asked]
        assert len(bench.hot()) <= 2
        assert bench.counted("tandem_pool_evictions_total") >= 4

    run(store, test)


def test_one_load_for_all_who_wait(store: Store) -> None:
    async def test(bench: Bench) -> None:
        assert set(await asyncio.gather(*(bench.label("two") for _ in range(20)))) == {LABELS[1]}
        assert len(bench.pool.hosted["two"].metrics._loads) == 1

    run(store, test)


def test_what_is_in_use_stays_and_whoever_waits_is_told_in_time(store: Store) -> None:
    async def test(bench: Bench) -> None:
        for name in ("one", "two"):
            await bench.label(name)
            bench.pool.enter(name)
        response = await bench.predict("three", timeout_s=0.05)
        assert response[0] == 503, response
        assert bench.hot() == {"one", "two"}
        waiting = asyncio.ensure_future(bench.label("three"))
        await until(lambda: bool(bench.pool.hosted["three"].queued))
        bench.pool.leave("two")
        assert await waiting == LABELS[2]
        assert bench.hot() == {"one", "three"}
        bench.pool.leave("one")

    run(store, test)


def test_a_caller_that_goes_away_gives_up_its_place(store: Store) -> None:
    async def test(bench: Bench) -> None:
        for name in ("one", "two"):
            await bench.label(name)
            bench.pool.enter(name)
        hosted = bench.pool.hosted["three"]
        waiting = asyncio.ensure_future(bench.label("three"))
        await until(lambda: bool(hosted.queued))
        waiting.cancel()
        await until(lambda: hosted.loading is None)
        assert not hosted.queued
        bench.pool.leave("one")
        bench.pool.leave("two")
        assert bench.hot() == {"one", "two"}
        assert await bench.label("three") == LABELS[2]

    run(store, test)


def test_a_model_that_comes_back_is_the_one_of_today(store: Store) -> None:
    async def test(bench: Bench) -> None:
        for name in NAMES:
            await bench.label(name)
        assert "one" not in bench.hot()
        publish_mlp(store, "one", 7)
        assert await bench.label("one") == LABELS[7]

    run(store, test)


@pytest.mark.parametrize("room", [3.5, 1.5])
def test_a_hot_model_follows_its_alias_with_room_beside_it_or_without(store: Store, room: float) -> None:
    async def test(bench: Bench) -> None:
        await bench.label("one")
        publish_mlp(store, "one", 7)
        async with asyncio.timeout(30):
            while await bench.label("one") != LABELS[7]:
                assert bench.pool.budget.held_bytes <= bench.pool.budget.limit_bytes
                await asyncio.sleep(0.005)

    run(store, test, room=room)


def test_a_model_that_cannot_be_loaded_harms_nobody_else(store: Store) -> None:
    publish(store, "three", b"not a graph", MLP)

    async def test(bench: Bench) -> None:
        for _ in range(2):
            status, body = await bench.predict("three")
            assert (status, "can't be loaded" in body["error"]) == (503, True), body
            assert await bench.label("one") == LABELS[0]
        assert (await bench.ask("GET", "/v2/models/three/ready"))[0] == 503
        assert bench.pool.budget.bytes_of("three") == 0

    run(store, test)


def test_a_trial_pins_its_model_and_both_versions_count(store: Store) -> None:
    registry = Registry(store)
    publish_mlp(store, "one", 7, alias=None)

    async def test(bench: Bench) -> None:
        await bench.label("one")
        trials.begin(registry, "one", "live", 2, mode="canary", steps=(50,), why="test")
        hosted = bench.pool.hosted["one"]
        await until(lambda: hosted.on_trial)
        assert bench.pool.budget.bytes_of("one") > 1.5 * bench.size
        assert {await bench.label("one") for _ in range(20)} == {LABELS[0], LABELS[7]}
        assert (await bench.predict("two", timeout_s=0.05))[0] == 503
        assert hosted.replica is not None
        assert hosted.replica.tried is not None
        trials.abandon(registry, "one", "live", hosted.replica.tried.trial, why="test")
        assert await bench.label("two") == LABELS[1]
        assert bench.pool.budget.bytes_of("one") <= bench.size * 1.1

    run(store, test, room=2.5)


def test_asking_about_a_cold_model_loads_nothing(store: Store) -> None:
    async def test(bench: Bench) -> None:
        assert (await bench.ask("GET", "/v2/models/one/ready")) == (200, {"ready": True})
        status, metadata = await bench.ask("GET", "/v2/models/one")
        assert (status, metadata["versions"], metadata["platform"]) == (200, ["1"], "onnx")
        assert (await bench.ask("GET", "/v2/models/one/versions/9"))[0] == 404
        assert (await bench.ask("GET", "/v2/models/one/infer"))[0] == 405
        assert (await bench.ask("GET", "/v2/models/nope"))[0] == 404
        feedback = orjson.dumps({"version": "1", "score": 1})
        assert (await bench.ask("POST", "/v1/models/one:feedback", feedback))[0] == 202
        assert bench.hot() == set()
        await bench.label("one")
        assert (await bench.ask("GET", "/v2/models/one"))[1] == metadata

    run(store, test)


def test_stopping_answers_those_who_wait_for_a_load(store: Store) -> None:
    async def test(bench: Bench) -> None:
        for name in ("one", "two"):
            await bench.label(name)
            bench.pool.enter(name)
        waiting = asyncio.ensure_future(bench.predict("three"))
        await until(lambda: bool(bench.pool.hosted["three"].queued))
        await bench.pool.stop()
        assert (await waiting)[0] == 503
        assert bench.pool.budget.held_bytes == 0

    run(store, test)


def test_a_model_larger_than_the_pool_is_told_at_deploy_and_when_asked(store: Store) -> None:
    registry = Registry(store)
    version = registry.resolve(ServedModel(model="one@live").ref)
    with pytest.raises(BadInput, match="larger than the whole pool"):
        check_fits(registry, [version], 100)
    check_fits(registry, [version], files_bytes(registry.servable(version)[0]))

    async def test(bench: Bench) -> None:
        status, body = await bench.predict("one")
        assert (status, "larger than the whole pool" in body["error"]) == (503, True)

    run(store, test, room=0.5)


def test_load_of_many_is_one() -> None:
    def load(rows: float, capacity: float | None, busy: float) -> Load:
        return Load(
            waiting_requests=1,
            oldest_waiting_s=rows / 100,
            busy_fraction=busy,
            capacity_rows_per_s=capacity,
            arrivals_per_s=rows,
            arriving_rows_per_s=rows,
            lost_per_s=0,
        )

    both = summed([load(50, 100, 0.5), load(10, 20, 0.5), load(0, None, 0)], cpus=1)
    assert both.capacity_rows_per_s is not None
    assert both.arriving_rows_per_s / both.capacity_rows_per_s == pytest.approx(1.0)
    assert (both.busy_fraction, both.waiting_requests, both.oldest_waiting_s) == (1.0, 3, 0.5)
    assert summed([], cpus=1).capacity_rows_per_s is None


SERVICE = """
store: s3://bucket/store
pool: {memory_gib: 1, replicas: {min: 2, max: 3, cpus: 2}}
models: [{model: a@live, pooled: true}, {model: b@live, pooled: true}, {model: c@live}]
"""


def test_the_service_file_and_what_becomes_of_it() -> None:
    from serving.app import build
    from serving.layout import applications

    service = parse_yaml(Service, SERVICE, "a test")
    assert Service.model_validate(service.model_dump(mode="json")) == service
    made = applications(service)
    assert [(a.name, a.route_prefix) for a in made] == [("tandem--c", "/v2/models/c"), ("tandem", "/")]
    assert build(made[-1].args)._bound_deployment.name == "pool"
    assert build(made[0].args)._bound_deployment.name == "model"


def test_on_kubernetes_the_pool_is_counted_and_linted() -> None:
    from k8s.lint.across import across
    from k8s.rayservice import render_service
    from k8s.settings import ClusterSettings

    service = parse_yaml(Service, SERVICE, "a test")
    manifests = render_service(service, ClusterSettings())
    rendered = next(m for m in manifests if m["kind"] == "RayService")
    groups = rendered["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert [(g["groupName"], g["minReplicas"], g["maxReplicas"]) for g in groups] == [
        ("cpu1", 1, 1),
        ("cpu2", 2, 3),
    ]
    config = yaml.safe_load(rendered["spec"]["serveConfigV2"])
    assert [a["route_prefix"] for a in config["applications"]] == ["/v2/models/c", "/"]
    assert config["applications"][1]["args"]["service"]["pool"]["memory_gib"] == 1
    assert list(across(manifests)) == []
    groups[1]["maxReplicas"] = 1
    (finding,) = across(manifests)
    assert "CPUs" in str(finding)
    assert "the pool" in str(finding)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (SERVICE.replace("pool:", "# pool:"), "a pool, since a@live"),
        (SERVICE.replace(", pooled: true", ""), "a model that says pooled: true"),
        (SERVICE.replace("min: 2", "min: 0"), "at least 1"),
        (SERVICE.replace("b@live,", "b@live, replicas: {max: 2},"), "no replicas of its own"),
    ],
)
def test_service_files_that_make_no_sense(text: str, why: str) -> None:
    with pytest.raises(TandemError, match=why):
        parse_yaml(Service, text, "a test")
