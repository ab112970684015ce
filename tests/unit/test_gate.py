"""The gate judges numbers, and passes nothing that it can't know."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import BadInput
from training.gate import Incomparable, check_gate, judge
from training.recipe import Gate

BETTER = {"accuracy": True, "rmse": False}
numbers = st.floats(-1e6, 1e6)
slacks = st.floats(0, 1e3)


def test_without_a_gate_everything_finite_passes() -> None:
    verdict = judge(None, {"accuracy": 0.1}, None, BETTER)
    assert verdict.passed
    assert verdict.reasons == ("no gate in the recipe",)


@given(value=numbers, bound=numbers)
def test_bounds_are_met_by_equality(value: float, bound: float) -> None:
    at_least = judge(Gate(at_least=bound), {"accuracy": value}, None, BETTER)
    at_most = judge(Gate(metric="rmse", at_most=bound), {"rmse": value}, None, BETTER)
    assert at_least.passed == (value >= bound)
    assert at_most.passed == (value <= bound)


@given(live=numbers, slack=slacks, further=st.floats(1e-3, 1e3))
def test_no_worse_than_live_is_a_bound_in_the_metrics_own_direction(
    live: float, slack: float, further: float
) -> None:
    for metric, sign in (("accuracy", -1), ("rmse", +1)):
        gate = Gate(metric=metric, no_worse_than_live_by=slack)

        def passes(value: float, gate: Gate = gate, metric: str = metric) -> bool:
            return judge(gate, {metric: value}, {metric: live}, BETTER).passed

        assert passes(live)
        assert passes(live - sign * further)
        assert not passes(live + sign * (slack + further))


def test_a_difference_that_only_rounding_makes_too_large_is_held() -> None:
    assert 0.975 - 0.97 > 0.005
    gate = Gate(no_worse_than_live_by=0.005)
    assert judge(gate, {"accuracy": 0.97}, {"accuracy": 0.975}, BETTER).passed


@given(
    value=st.sampled_from([math.nan, math.inf, -math.inf]),
    gate=st.sampled_from([None, Gate(at_least=-1e9), Gate(no_worse_than_live_by=1e9)]),
)
def test_what_is_not_finite_never_passes(value: float, gate: Gate | None) -> None:
    assert not judge(gate, {"accuracy": value}, {"accuracy": 0.5}, BETTER).passed
    assert not judge(gate, {"accuracy": 0.9, "rmse": value}, {"accuracy": 0.5}, BETTER).passed


def test_against_a_live_version_that_is_missing_unmeasurable_or_nan() -> None:
    gate = Gate(no_worse_than_live_by=0.01)
    assert judge(gate, {"accuracy": 0.5}, None, BETTER).passed
    unmeasurable = judge(gate, {"accuracy": 0.5}, Incomparable("it takes another column"), BETTER)
    assert not unmeasurable.passed
    assert "it takes another column" in unmeasurable.reasons[0]
    assert not judge(gate, {"accuracy": 0.5}, {"accuracy": math.nan}, BETTER).passed
    assert not judge(gate, {"accuracy": 0.5}, {}, BETTER).passed


def test_every_rule_gives_its_reason() -> None:
    gate = Gate(at_least=0.95, no_worse_than_live_by=0.01)
    verdict = judge(gate, {"accuracy": 0.96}, {"accuracy": 0.99}, BETTER)
    assert not verdict.passed
    assert verdict.reasons == (
        "held: accuracy 0.96, at least 0.95",
        "broken: accuracy 0.96, no worse than the live version's 0.99 by 0.01",
    )


def test_a_metric_that_the_task_lacks_is_refused_with_those_it_has() -> None:
    gate = Gate(metric="f1", at_least=0.5)
    for refuse in (lambda: check_gate(gate, BETTER), lambda: judge(gate, {"accuracy": 1.0}, None, BETTER)):
        with pytest.raises(BadInput) as caught:
            refuse()
        assert caught.value.allowed == "accuracy, rmse"


@pytest.mark.parametrize(
    "gate", [Gate(), Gate(at_most=0.5), Gate(metric="rmse", at_least=3.0)], ids=["empty", "high", "low"]
)
def test_a_gate_that_means_nothing_is_refused_before_training(gate: Gate) -> None:
    with pytest.raises(BadInput):
        check_gate(gate, BETTER)


def test_sensible_gates_are_let_through_before_training() -> None:
    for gate in (None, Gate(at_least=0.9), Gate(metric="rmse", at_most=2, no_worse_than_live_by=0.1)):
        check_gate(gate, BETTER)
