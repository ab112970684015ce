"""The same trace under several policies, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from serving.scaling.policy import Settings
from serving.simulator.baselines import Knative, ServeDefault
from serving.simulator.ours import Ours
from serving.simulator.traces import Times
from serving.simulator.world import Result, Scaler, Setting, World

DEFAULT = ("ours", "serve", "knative")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Results by the policy's name."""

    results: Mapping[str, Result]

    def ratios(self, of: str, to: str) -> tuple[float, float]:
        """Violations and replica-seconds of one policy by those of another; nan for 0 by 0."""
        one, other = self.results[of], self.results[to]
        return (
            _ratio(one.violations, other.violations),
            _ratio(sum(one.replica_s), sum(other.replica_s)),
        )


def policies(setting: Setting) -> dict[str, Callable[[], Scaler]]:
    """Every policy by name, made anew for each replay.

    `knative` gets the largest batch as its concurrency target, as one would set it for this replica;
    `knative-default` Knative's own 100. `ours-…` are the other forecasts.
    """
    (least, most), kind = setting.bounds[0], setting.kinds[0]

    def ours(forecast: str) -> Callable[[], Scaler]:
        settings = Settings(least=least, most=most, slo_s=setting.slo_s, forecast=forecast)
        return lambda: Ours(settings)

    return {
        "ours": ours("rises"),
        "ours-level": ours("level"),
        "ours-trend": ours("trend"),
        "serve": ServeDefault,
        "knative": lambda: Knative(float(kind.max_batch * kind.slots)),
        "knative-default": Knative,
    }


def compare(setting: Setting, times_s: Times, names: tuple[str, ...] = DEFAULT) -> Comparison:
    """Replay `times_s` [requests] under each of the policies named."""
    known = policies(setting)
    return Comparison({name: World(setting, known[name]()).replay(times_s) for name in names})


def _ratio(one: float, other: float) -> float:
    if other == 0:
        return float("nan") if one == 0 else float("inf")
    return one / other
