"""What a group's pod asks for: CPUs and GPUs from its containers' limits. Arithmetic only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_MILLI = "m"


class Demand(NamedTuple):
    """CPUs and GPUs of some pods."""

    cpus: float
    gpus: float

    def __add__(self, other: object) -> Demand:
        assert isinstance(other, Demand)
        return Demand(self.cpus + other.cpus, self.gpus + other.gpus)

    def __sub__(self, other: Demand) -> Demand:
        return Demand(self.cpus - other.cpus, self.gpus - other.gpus)

    def __mul__(self, times: object) -> Demand:
        assert isinstance(times, int | float)
        return Demand(self.cpus * times, self.gpus * times)


def demand(group: Mapping[str, Any]) -> Demand:
    """Of one pod of a head or worker group: its containers together, requests where there are no limits.

    Init containers count where they go on running. GPUs that Ray is told of by hand (`num-gpus`) take the
    place of those in the resources: slices of GPUs are called by names that the operator doesn't count.
    """
    pod = (group.get("template") or {}).get("spec") or {}
    cpus, gpus = 0.0, 0.0
    sidecars = [one for one in pod.get("initContainers") or [] if one.get("restartPolicy") == "Always"]
    for container in [*(pod.get("containers") or []), *sidecars]:
        resources = container.get("resources") or {}
        sizes = {**(resources.get("requests") or {}), **(resources.get("limits") or {})}
        cpus += cpu(sizes.get("cpu", 0))
        gpus += sum(float(value) for name, value in sizes.items() if str(name).endswith("gpu"))
    told = str((group.get("rayStartParams") or {}).get("num-gpus"))
    return Demand(cpus, float(told) if told.isdecimal() else gpus)


def cpu(quantity: str | float) -> float:
    """A CPU quantity as Kubernetes writes it: `500m`, `2`, 1.5."""
    text = str(quantity)
    return float(text[:-1]) / 1000 if text.endswith(_MILLI) else float(text)
