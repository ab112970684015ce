"""A trial on a real replica: shares, candidates that fail, shadows, feedback, and the log that results."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import pytest
from servables import GATHER, MLP, gather_graph, mlp_graph, publish

from cluster import trials
from cluster.names import ModelRef
from cluster.registry import Registry
from cluster.storage import Store, memory_store
from cluster.trial import Rules, Trial
from serving.http import Request, Response
from serving.metrics import ReplicaMetrics
from serving.model_app import ModelApp
from serving.replica import Replica
from serving.rollout.jury import Jury
from serving.rollout.tried import Tried
from serving.service import ServedModel

REF = ModelRef("m", "live")
ZEROS = {"instances": [[0.0] * 64]}
WRONG = {"instances": [[0.0] * 63]}


def trial_of(registry: Registry, **rules: Any) -> Trial:
    entry = trials.begin(
        registry,
        "m",
        "live",
        2,
        mode=rules.pop("mode", "canary"),
        steps=rules.pop("steps", (10,)),
        rules=Rules(**rules),
        why="test",
    )
    trial = entry.aliases["live"].trial
    assert trial is not None
    return trial


def with_trial(
    store: Store, trial: Trial, body: Callable[[ModelApp, Tried[Any]], Awaitable[None]]
) -> Tried[Any]:
    """Run `body` against a replica of version 1 that tries version 2."""

    async def run() -> Tried[Any]:
        registry, metrics = Registry(store), ReplicaMetrics("m")
        replica = Replica(ServedModel(model="m@live"), store, metrics)
        replica.start(replica.load(registry.resolve(ModelRef("m", "1"))))
        tried = Tried(trial, replica.load(registry.resolve(ModelRef("m", "2"))))
        replica.try_candidate(tried)
        try:
            await asyncio.wait_for(body(ModelApp(replica, metrics, _nothing), tried), 60)
        finally:
            await replica.stop()
        return tried

    return asyncio.run(run())


async def ask(app: ModelApp, content: Any, route: str = "predict", session: bytes | None = None) -> Response:
    message = {"type": "http.request", "body": orjson.dumps(content), "more_body": False}

    async def receive() -> Any:
        return message

    headers = {b"content-type": b"application/json"}
    if session is not None:
        headers[b"x-session-id"] = session
    return await app.respond_to(Request("POST", f"/v1/models/m:{route}", headers, "1", receive))


def version(response: Response) -> str:
    return dict(response.headers)[b"x-model-version"].decode()


@pytest.fixture
def store() -> Store:
    made = memory_store()
    publish(made, "m", mlp_graph(1), MLP)
    return made


def test_the_candidate_gets_its_share_and_answers_as_itself(store: Store) -> None:
    publish(store, "m", mlp_graph(2), MLP, alias=None)
    seen: Counter[tuple[str, str]] = Counter()

    async def body(app: ModelApp, tried: Tried[Any]) -> None:
        for _ in range(100):
            answer = await ask(app, ZEROS)
            label = orjson.loads(answer.body)["predictions"][0]["label"]
            seen[(version(answer), label)] += 1
        sessions = [version(await ask(app, ZEROS, session=b"anna")) for _ in range(5)]
        assert len(set(sessions)) == 1

    tried = with_trial(store, trial_of(Registry(store)), body)
    assert seen == {("1", "one"): 90, ("2", "two"): 10}
    assert tried.evidence.candidate.requests + tried.evidence.stable.requests == 105
    assert tried.evidence.candidate.failed == 0


def test_a_candidate_that_cant_answer_costs_the_caller_nothing(store: Store) -> None:
    publish(store, "m", gather_graph(), GATHER, alias=None)

    async def body(app: ModelApp, tried: Tried[Any]) -> None:
        answers = [await ask(app, ZEROS) for _ in range(10)]
        assert {(answer.status, version(answer)) for answer in answers} == {(200, "1")}

    tried = with_trial(store, trial_of(Registry(store), steps=(100,)), body)
    assert (tried.evidence.candidate.failed, tried.evidence.stable.failed) == (10, 0)


def test_a_request_that_nobody_can_answer_is_nobodys_fault(store: Store) -> None:
    publish(store, "m", mlp_graph(2), MLP, alias=None)

    async def body(app: ModelApp, tried: Tried[Any]) -> None:
        for _ in range(4):
            assert (await ask(app, WRONG)).status == 422

    tried = with_trial(store, trial_of(Registry(store), steps=(50,)), body)
    assert (tried.evidence.candidate.failed, tried.evidence.stable.failed) == (0, 0)


def test_a_shadow_answers_nobody_and_is_compared(store: Store) -> None:
    publish(store, "m", mlp_graph(2), MLP, alias=None)

    async def body(app: ModelApp, tried: Tried[Any]) -> None:
        for number in range(1, 4):
            assert version(await ask(app, ZEROS)) == "1"
            while tried.evidence.compared < number:
                await asyncio.sleep(0.001)

    tried = with_trial(store, trial_of(Registry(store), mode="shadow", steps=(100,)), body)
    assert (tried.evidence.compared, tried.evidence.differed) == (3, 3)
    assert (tried.evidence.candidate.requests, tried.evidence.stable.requests) == (3, 3)


def test_batches_are_compared_with_what_the_version_in_service_takes(store: Store) -> None:
    publish(store, "m", mlp_graph(2), MLP, alias=None)

    async def body(app: ModelApp, tried: Tried[Any]) -> None:
        stable, candidate = app._replica.serving.model, tried.candidate.model
        assert candidate.latency.terms_s == stable.latency.terms_s, "it begins with what is known already"
        assert candidate.latency is not stable.latency
        for _ in range(20):
            await ask(app, ZEROS)
        usual_s = stable.latency.estimate_s(4)
        candidate.seen(4, 0, 3 * usual_s)
        stable.seen(64, 0, stable.latency.estimate_s(64))

    tried = with_trial(store, trial_of(Registry(store), steps=(50,)), body)
    candidate, stable = tried.evidence.candidate, tried.evidence.stable
    assert (candidate.times.total(), stable.times.total()) == (11, 11)
    assert candidate.slower_than(2.0) >= 1


def test_feedback_counts_for_the_version_that_answered(store: Store) -> None:
    publish(store, "m", mlp_graph(2), MLP, alias=None)

    async def body(app: ModelApp, tried: Tried[Any]) -> None:
        told = [
            {"version": "1", "prediction": "one", "label": "one"},
            {"version": "2", "prediction": "two", "label": "one"},
            {"version": "2", "score": 0.5},
            {"version": "9", "score": 1},
        ]
        answer = await ask(app, told, route="feedback")
        assert (answer.status, orjson.loads(answer.body)) == (202, {"counted": 3})
        for wrong in ({"version": 2, "score": 1}, {"version": "2"}, [1], {"version": "2", "score": True}):
            assert (await ask(app, wrong, route="feedback")).status == 422

    tried = with_trial(store, trial_of(Registry(store)), body)
    assert tried.evidence.stable.scores.mean == 1
    assert (tried.evidence.candidate.scores.count, tried.evidence.candidate.scores.mean) == (2, 0.25)


def test_the_jury_promotes_what_holds_and_abandons_what_fails(store: Store) -> None:
    registry = Registry(store)
    publish(store, "m", mlp_graph(2), MLP, alias=None)
    trial = trial_of(registry, steps=(50,), hold_s=0, least_requests=10)

    async def use(app: ModelApp, tried: Tried[Any]) -> None:
        for _ in range(40):
            await ask(app, ZEROS)

    seen = with_trial(store, trial, use).snapshot()
    Jury(store, REF, "replica-1").sit(trial, seen, 1)
    assert registry.resolve(REF).version == 2
    Jury(store, REF, "replica-2").sit(trial, seen, 1)  # too late, and no harm done

    publish(store, "m", gather_graph(), GATHER, alias=None)
    registry.promote("m", "live", 1, why="back")
    entry = trials.begin(registry, "m", "live", 3, mode="canary", steps=(50,), why="test")
    bad = entry.aliases["live"].trial
    assert bad is not None
    seen.candidate.failed = 20
    Jury(store, REF, "replica-1", draw=lambda: 0.999).sit(bad, seen, 0)
    newest = registry.newest("m")
    assert newest is not None
    assert (newest.action, newest.aliases["live"].version) == ("abandon", 1)
    assert "20 of 20" in newest.why


def test_a_jury_of_many_asks_the_store_as_often_as_one(store: Store) -> None:
    registry = Registry(store)
    publish(store, "m", mlp_graph(2), MLP, alias=None)
    trial = trial_of(registry, steps=(50,), hold_s=0, least_requests=10)

    async def use(app: ModelApp, tried: Tried[Any]) -> None:
        for _ in range(8):
            await ask(app, ZEROS)

    seen = with_trial(store, trial, use).snapshot()
    assert seen.candidate.requests == 4
    for replica in ("a", "b", "c"):
        Jury(store, REF, replica, draw=lambda: 0.9).sit(trial, seen, 1)
        assert registry.resolve(REF).version == 1
    # Alone it has too few requests; with the others' it has enough.
    Jury(store, REF, "a", draw=lambda: 0.1).sit(trial, seen, 1)
    assert registry.resolve(REF).version == 2


async def _nothing() -> bytes:
    return b""
