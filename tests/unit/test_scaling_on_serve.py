"""The policy as Ray Serve calls it, on Serve's own context and through Serve's own wrapper."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from ray.serve._private.common import TimeStampedValue
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serving.load import Load
from serving.scaling.on_serve import PATH, TargetPolicy
from serving.scaling.report import read, written

WALL_S = 1_000_000.0


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


def load(rows_s: float = 10.0, lost_s: float = 0.0) -> Load:
    return Load(
        waiting_requests=0,
        oldest_waiting_s=0.0,
        busy_fraction=0.5,
        capacity_rows_per_s=50.0,
        arrivals_per_s=rows_s,
        arriving_rows_per_s=rows_s,
        lost_per_s=lost_s,
    )


def raw(loads: list[Load], at_s: float) -> dict[str, dict[str, list[TimeStampedValue]]]:
    series: dict[str, dict[str, list[TimeStampedValue]]] = {}
    for index, one in enumerate(loads):
        for name, value in written(one).items():
            series.setdefault(name, {})[f"replica-{index}"] = [TimeStampedValue(at_s, value)]
    return series


def context(
    *,
    ready: int,
    target: int,
    at_s: float,
    loads: list[Load] = (),
    queued: Any = 0.0,
    **other: Any,  # type: ignore[assignment]
) -> AutoscalingContext:
    options: dict[str, Any] = {
        "deployment_id": None,
        "deployment_name": "model",
        "app_name": "app",
        "current_num_replicas": ready,
        "target_num_replicas": target,
        "running_replicas": [],
        "total_num_requests": 0.0,
        "total_queued_requests": queued,
        "aggregated_metrics": {},
        "raw_metrics": raw(list(loads), WALL_S + at_s),
        "capacity_adjusted_min_replicas": 1,
        "capacity_adjusted_max_replicas": 10,
        "policy_state": {},
        "last_scale_up_time": None,
        "last_scale_down_time": None,
        "current_time": WALL_S + at_s,
        "config": None,
    }
    return AutoscalingContext(**{**options, **other})


def test_serve_finds_it_by_its_path() -> None:
    found = AutoscalingPolicy(policy_function=PATH, policy_kwargs={"most": 4}).get_policy()
    assert found.__name__ == "TargetPolicy"


def test_it_scales_with_the_load_through_serves_own_wrapper() -> None:
    clock = HandClock()
    config = AutoscalingConfig(min_replicas=1, max_replicas=10, upscale_delay_s=0, downscale_delay_s=0)
    policy = _apply_autoscaling_config(TargetPolicy(clock, least=1, most=10))
    target = 1
    for second in range(90):
        clock.now_s = float(second)
        rows_s = 10.0 if second < 60 else 300.0
        loads = [load(rows_s / target)] * target
        target, _ = policy(context(ready=target, target=target, at_s=second, loads=loads, config=config))
    assert target >= 300 / 50


def test_reports_that_are_old_change_nothing() -> None:
    clock = HandClock()
    policy = TargetPolicy(clock, least=1, most=10)
    for second in range(0, 1000, 10):
        clock.now_s = float(second)
        stale = raw([load(0.0)], WALL_S)
        wanted, _ = policy(context(ready=4, target=4, at_s=second + 60, raw_metrics=stale))
        assert wanted == 4


def test_what_raises_inside_keeps_the_number_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = HandClock()
    policy = TargetPolicy(clock, least=1, most=10)

    def broken() -> float:
        raise RuntimeError("no metrics")

    with caplog.at_level(logging.ERROR, "tandem.serving"):
        for second in range(3):
            clock.now_s = float(second)
            assert policy(context(ready=3, target=3, at_s=second, loads=[load()], queued=broken))[0] == 3
    assert len(caplog.records) == 1


def test_a_start_that_serve_decided_is_learned() -> None:
    clock = HandClock()
    clock.now_s = 100.0
    policy = TargetPolicy(clock, least=0, most=10)
    policy(context(ready=1, target=1, at_s=100.0, loads=[load()], last_scale_up_time=WALL_S + 97.0))
    assert policy._state.starts.cold_start_s == pytest.approx(3.0)


def test_a_load_survives_the_way_through_serve() -> None:
    there = load(12.5, 1.5)
    assert read(raw([there], 50.0), 51.0) == [there]
    assert read(raw([there], 50.0), 61.0) == []
    assert read({}, 1.0) == []
    assert read(None, 1.0) == []
