"""Two kinds of replica in the service file, as applications, in the policy's adapter, and their weights."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from ray.serve._private.common import TimeStampedValue
from ray.serve.config import AutoscalingPolicy

from serving import lane
from serving.layout import applications
from serving.load import Load
from serving.scaling import kinds_on_serve, kinds_table
from serving.scaling.kinds_on_serve import KindPolicy
from serving.scaling.report import written
from serving.service import Service
from serving.weights import MOST, weight

WALL_S = 1_000_000.0
LOAD = Load(
    waiting_requests=0,
    oldest_waiting_s=0.0,
    busy_fraction=0.5,
    capacity_rows_per_s=40.0,
    arrivals_per_s=10.0,
    arriving_rows_per_s=20.0,
    lost_per_s=0.0,
)
TERMS = [[1, 20, 0.1], [0, 4, 1.2]]


def service(*models: dict[str, Any]) -> Service:
    return Service.model_validate({"store": "/tmp/nowhere", "models": list(models)})


def test_a_second_kind_is_an_application_behind_its_models_prefix() -> None:
    two = {"model": "a@live", "other_replicas": {"min": 0, "max": 2, "gpus": 1}}
    alone = [(a.name, a.route_prefix, a.args.get("other")) for a in applications(service(two))]
    assert alone == [("tandem", "/", None), ("tandem--.other.a", "/-kinds", True)]
    several = [(a.name, a.route_prefix) for a in applications(service(two, {"model": "b@live"}))]
    assert several == [
        ("tandem--a", "/v2/models/a"),
        ("tandem--b", "/v2/models/b"),
        ("tandem--.other.a", "/-kinds/v2/models/a"),
        ("tandem", "/"),
    ]


def test_prices() -> None:
    model = service({"model": "a@live", "other_replicas": {"gpus": 1, "cpus": 4}}).models[0]
    assert [kind.price for kind in model.kinds] == pytest.approx([0.05, 2.7])
    priced = service({"model": "a@live", "replicas": {"cost_per_hour": 3}}).models[0]
    assert [kind.price for kind in priced.kinds] == [3]
    with pytest.raises(ValidationError, match="other_replicas"):
        service({"model": "a@live", "other_replicas": {"min": 3, "max": 2}})


def test_a_weight_is_what_can_be_in_flight_and_in_time() -> None:
    assert weight(None, 1.0) == weight(replace(LOAD, capacity_rows_per_s=None), 1.0) == MOST
    assert weight(LOAD, 1.0) == 10, "40 rows a second for half a second, two rows a request"
    assert weight(replace(LOAD, oldest_waiting_s=1.0), 1.0) == 5, "its queue is twice as old as it may be"
    assert weight(replace(LOAD, capacity_rows_per_s=1e9), 1.0) == MOST
    assert weight(replace(LOAD, capacity_rows_per_s=0.1), 1.0) == 1


def test_the_port_is_told_once() -> None:
    told: list[int] = []
    lane.leave()
    lane.when_port_is_known(told.append)
    assert lane._told
    lane.leave()
    assert not lane._told


class HandClock:
    """Moves when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def wall(self) -> Any:
        raise NotImplementedError

    def monotonic_s(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


def context(*, ready: int, target: int, at_s: float, loads: list[Load], **other: Any) -> Any:
    raw: dict[str, dict[str, list[TimeStampedValue]]] = {}
    for index, load in enumerate(loads):
        for name, value in written(load).items():
            raw.setdefault(name, {})[f"replica-{index}"] = [TimeStampedValue(WALL_S + at_s, value)]
    options = {
        "current_num_replicas": ready,
        "target_num_replicas": target,
        "total_queued_requests": 0.0,
        "raw_metrics": raw,
        "current_time": WALL_S + at_s,
        "last_scale_up_time": None,
    }
    return SimpleNamespace(**options | other)


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> tuple[HandClock, KindPolicy, KindPolicy]:
    monkeypatch.setattr(kinds_table, "_tables", {})
    clock = HandClock()
    one, other = (KindPolicy("tandem", kind, TERMS, clock, slo_s=1.0) for kind in range(2))
    return clock, one, other


def test_serve_finds_it_by_its_path() -> None:
    options = {"group": "x", "kind": 0, "terms": TERMS}
    found = AutoscalingPolicy(policy_function=kinds_on_serve.PATH, policy_kwargs=options).get_policy()
    assert found.__name__ == "KindPolicy"


def test_copies_that_serve_makes_of_the_policy_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds_table, "_tables", {})
    made = []
    for kind in range(2):
        options = {"group": "x", "kind": kind, "terms": TERMS}
        policy = AutoscalingPolicy(policy_function=kinds_on_serve.PATH, policy_kwargs=options).get_policy()
        made.append(policy(**options))
    assert made[0]._table is made[1]._table


def test_what_both_see_decides_for_both(policies: tuple[HandClock, KindPolicy, KindPolicy]) -> None:
    clock, one, other = policies
    few, many = 1, 0
    for second in range(60):
        clock.now_s = float(second)
        rows_s = 10.0 if second < 30 else 900.0
        loads = [replace(LOAD, arriving_rows_per_s=rows_s / few)] * few
        few, _ = one(context(ready=few, target=few, at_s=second, loads=loads))
        fast = [replace(LOAD, arriving_rows_per_s=0.0, capacity_rows_per_s=800.0)] * many
        many, _ = other(context(ready=many, target=many, at_s=second, loads=fast))
    assert many >= 1
    assert few > 1


def test_while_one_kind_says_nothing_nothing_changes(
    policies: tuple[HandClock, KindPolicy, KindPolicy],
) -> None:
    clock, one, other = policies
    for second in range(5):
        clock.now_s = float(second)
        assert one(context(ready=3, target=3, at_s=second, loads=[LOAD] * 3))[0] == 3
        assert other(context(ready=2, target=2, at_s=second, loads=[]))[0] == 2


def test_what_raises_keeps_the_number_and_is_told_once(
    policies: tuple[HandClock, KindPolicy, KindPolicy], caplog: pytest.LogCaptureFixture
) -> None:
    _, one, _ = policies
    with caplog.at_level(logging.ERROR, "tandem.serving"):
        for _ in range(3):
            assert one(SimpleNamespace(target_num_replicas=3)) == (3, {})
    assert len(caplog.records) == 1


def test_a_start_that_serve_decided_is_learned(policies: tuple[HandClock, KindPolicy, KindPolicy]) -> None:
    clock, one, other = policies
    clock.now_s = 100.0
    other(context(ready=0, target=0, at_s=100.0, loads=[]))
    one(context(ready=1, target=1, at_s=100.0, loads=[LOAD], last_scale_up_time=WALL_S + 97.0))
    state = one._table.state.kinds[0]
    assert state.starts.cold_start_s == pytest.approx(3.0)
