"""The gate: may this servable become a version? A pure judgement on numbers.

What can't be known doesn't pass: a metric that is NaN or infinite, gate or no gate (the model has
diverged), or a comparison with the live version that can't be made. Knows nothing of how metrics come about.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cluster.errors import BadInput, shown
from training.recipe import Gate


@dataclass(frozen=True, slots=True)
class Incomparable:
    """There is a live version, but it can't be measured on the new held-out data."""

    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gate decided, with a reason for each rule: those that held and those that didn't."""

    passed: bool
    reasons: tuple[str, ...]


def check_gate(gate: Gate | None, greater_is_better: Mapping[str, bool]) -> None:
    """Refuse, before training starts, a gate that could never be judged as meant.

    Args:
        gate: the recipe's.
        greater_is_better: the task's metrics.

    Raises:
        BadInput: the task has no such metric, nothing is asked of it, or the bound is on its wrong side.
    """
    if gate is None:
        return
    _check_metric(gate, greater_is_better)
    if gate.at_least is None and gate.at_most is None and gate.no_worse_than_live_by is None:
        raise BadInput(
            "the gate asks for nothing",
            got=f"only gate.metric: {gate.metric}",
            allowed="at_least, at_most, no_worse_than_live_by",
            fix="set one of them, or remove the gate",
        )
    wrong, right = ("at_most", "at_least") if greater_is_better[gate.metric] else ("at_least", "at_most")
    if getattr(gate, wrong) is not None:
        raise BadInput(
            f"the gate would let only bad values of '{gate.metric}' pass",
            got=f"{wrong}: {getattr(gate, wrong)}",
            allowed=right,
            fix=f"write gate.{right}",
        )


def judge(
    gate: Gate | None,
    metrics: Mapping[str, float],
    live_metrics: Mapping[str, float] | Incomparable | None,
    greater_is_better: Mapping[str, bool],
) -> Verdict:
    """Hold a servable's metrics against its gate.

    Args:
        gate: the recipe's; without one, everything finite passes.
        metrics: of the new servable on the held-out data.
        live_metrics: of the live version on the same data, None where there is no live version.
        greater_is_better: the task's metrics.

    Raises:
        BadInput: the task has no such metric.
    """
    if gate is not None:
        _check_metric(gate, greater_is_better)
    broken = tuple(
        f"broken: {name} is {value}" for name, value in metrics.items() if not math.isfinite(value)
    )
    if broken:
        return Verdict(False, broken)
    if gate is None:
        return Verdict(True, ("no gate in the recipe",))
    name, value = gate.metric, metrics[gate.metric]
    rules = []
    if gate.at_least is not None:
        rules.append((value >= gate.at_least, f"{name} {value:.6g}, at least {gate.at_least:.6g}"))
    if gate.at_most is not None:
        rules.append((value <= gate.at_most, f"{name} {value:.6g}, at most {gate.at_most:.6g}"))
    if gate.no_worse_than_live_by is not None:
        rules.append(
            _against_live(name, value, live_metrics, gate.no_worse_than_live_by, greater_is_better[name])
        )
    reasons = tuple(f"{'held' if held else 'broken'}: {text}" for held, text in rules)
    return Verdict(all(held for held, _ in rules), reasons or ("the gate asks for nothing",))


def _against_live(
    name: str,
    value: float,
    live_metrics: Mapping[str, float] | Incomparable | None,
    slack: float,
    greater_is_better: bool,
) -> tuple[bool, str]:
    if live_metrics is None:
        return True, "no live version to compare with"
    if isinstance(live_metrics, Incomparable):
        return False, f"can't be compared with the live version: {live_metrics.reason}"
    live = live_metrics.get(name, math.nan)
    if not math.isfinite(live):
        return False, f"can't be compared with the live version: its {name} is {live}"
    worse_by = live - value if greater_is_better else value - live
    # 0.975 - 0.97 is a little more than 0.005: what was meant as equal must not fail by rounding.
    held = worse_by <= slack or math.isclose(worse_by, slack, rel_tol=1e-9, abs_tol=1e-12)
    return held, f"{name} {value:.6g}, no worse than the live version's {live:.6g} by {slack:.6g}"


def _check_metric(gate: Gate, greater_is_better: Mapping[str, bool]) -> None:
    if gate.metric not in greater_is_better:
        raise BadInput(
            "the gate's metric is not one of the task's",
            got=shown(gate.metric),
            allowed=", ".join(sorted(greater_is_better)) or "none: the task has no metrics",
            fix="correct gate.metric" if greater_is_better else "remove the gate, or write metrics()",
        )
