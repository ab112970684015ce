"""A trace under one policy with one kind of replica, with another, and with both. Which is cheapest?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cluster.errors import BadInput, shown
from serving.scaling import kinds
from serving.scaling.kinds import Terms
from serving.scaling.observed import Seen
from serving.scaling.policy import Settings
from serving.simulator.compare import compare
from serving.simulator.replicas import Kind
from serving.simulator.traces import Times
from serving.simulator.world import Result, Setting, World


class Mixed:
    """`serving.scaling.kinds`, as the simulator asks it."""

    def __init__(self, settings: Settings, terms: Sequence[Terms]) -> None:
        self._settings = settings
        self._terms = tuple(terms)
        self._state = kinds.State()

    def __call__(self, seen: Sequence[Seen], targets: Sequence[int], now_s: float) -> Sequence[int]:
        """Two kinds."""
        wanted, self._state = kinds.decide(self._settings, self._terms, self._state, seen, targets, now_s)
        return wanted


def compare_kinds(setting: Setting, names: Sequence[str], times_s: Times) -> Mapping[str, Result]:
    """Replay `times_s` [requests] with each of two kinds alone, and with both.

    Alone, a kind has at least as many replicas as both together.

    Args:
        names: of the setting's two kinds.
    """
    results = {}
    together = sum(least for least, _ in setting.bounds)
    for name, kind, (_, most) in zip(names, setting.kinds, setting.bounds, strict=True):
        alone = replace(setting, kinds=(kind,), bounds=((min(together, most), most),))
        results[f"{name} alone"] = compare(alone, times_s, ("ours",)).results["ours"]
    terms = [Terms(*bounds, k.cost_per_hour) for k, bounds in zip(setting.kinds, setting.bounds, strict=True)]
    scaler = Mixed(Settings(slo_s=setting.slo_s), terms)
    results[" + ".join(names)] = World(setting, scaler).replay(times_s)
    return results


def parse_kind(text: str) -> tuple[str, Kind, tuple[int, int]]:
    """`NAME:base=S,row=S,cold=S,cost=N,batch=N,slots=N,min=N,max=N`, all but base and row optional.

    Raises:
        BadInput: it isn't that.
    """
    name, _, rest = text.partition(":")
    defaults = {"cold": 10.0, "cost": 1.0, "batch": 16.0, "slots": 1.0, "min": 0.0, "max": 1000.0}
    try:
        pairs = [part.partition("=") for part in rest.split(",")]
        told = {key.strip(): float(value) for key, _, value in pairs}
        said = defaults | told
        if not name or set(said) != {*defaults, "base", "row"} or len(told) != len(pairs):
            raise ValueError
        if not all(0 <= value < 1e6 for value in said.values()):
            raise ValueError
        if said["base"] + said["row"] <= 0 or min(said["batch"], said["slots"], said["max"]) < 1:
            raise ValueError
        if said["cold"] <= 0 or said["min"] > said["max"]:
            raise ValueError
    except ValueError:
        raise BadInput(
            "not a kind of replica",
            got=shown(text),
            allowed="NAME:base=S,row=S and of cold=S, cost=N, batch=N, slots=N, min=N, max=N some",
            fix="gpu:base=0.01,row=0.0002,cold=40,cost=2.5,batch=64,max=8",
        ) from None
    kind = Kind(
        said["base"],
        said["row"],
        int(said["batch"]),
        int(said["slots"]),
        said["cold"],
        cost_per_hour=said["cost"],
    )
    return name, kind, (int(said["min"]), int(said["max"]))
