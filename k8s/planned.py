"""Reads two sets of manifests and writes what the step from one to the other does: `tandem k8s plan`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import BadInput, NotFound, shown
from k8s.changes import Change, Manifest
from k8s.demand import Demand
from k8s.plan import Plan

_EFFECTS = ("new cluster", "in place", "waits", "new object", "left behind")
_KUSTOMIZE = "kustomize.config.k8s.io/"


def read_manifests(path: Path) -> list[Manifest]:
    """The objects in a YAML file, or in all of a folder's; a kustomization itself isn't one.

    Raises:
        NotFound: there is nothing at `path`.
        BadInput: what is there isn't a set of Kubernetes objects.
    """
    if not path.exists():
        raise NotFound(
            "there are no manifests", got=shown(str(path)), allowed="a YAML file, or a folder of some"
        )
    files = sorted(path.glob("*.y*ml")) if path.is_dir() else [path]
    objects: list[Manifest] = []
    for file in files:
        try:
            found = list(yaml.safe_load_all(file.read_text("utf-8")))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise BadInput(f"'{file}' can't be read", got=shown(str(error)), allowed="YAML") from None
        for one in found:
            if one is None:
                continue
            if not isinstance(one, dict) or not {"apiVersion", "kind"} <= set(one):
                raise BadInput(
                    f"'{file}' holds what is no Kubernetes object",
                    got=shown(one if not isinstance(one, dict) else list(one)),
                    allowed="objects with apiVersion and kind",
                    fix="give what `tandem k8s render --out` or `kubectl kustomize` wrote",
                )
            if not str(one["apiVersion"]).startswith(_KUSTOMIZE):
                objects.append(one)
    if not objects:
        raise BadInput(f"'{path}' holds no Kubernetes object", got="none", allowed="one at least")
    return objects


def as_json(found: Plan) -> dict[str, Any]:
    """A plan for programs."""
    return {
        "changes": [
            {"object": c.object, "path": c.path, "effect": c.effect, "cause": c.cause, "why": c.why}
            for c in found.changes
        ],
        "extra_at_first": found.extra_at_first._asdict(),
        "extra_at_most": found.extra_at_most._asdict(),
        "advice": list(found.advice),
        "strategies": dict(found.strategies),
    }


def as_text(found: Plan) -> Iterator[str]:
    """A plan for people, line by line: by effect, the reasons first."""
    if not found.changes:
        yield "nothing changes"
        return
    for effect in _EFFECTS:
        changes = [change for change in found.changes if change.effect == effect]
        if not changes:
            continue
        yield f"{effect}:"
        for change in sorted(changes, key=lambda change: not change.cause):
            yield "  " + _line(change)
    if "new cluster" in found.effects:
        first, most = _sizes(found.extra_at_first), _sizes(found.extra_at_most)
        yield f"beside what runs: {first} at first, {most} at most"
    for name, strategy in found.strategies.items():
        yield f"suits {name}: upgradeStrategy.type {strategy}"
    for line in found.advice:
        yield f"advice: {line}"


def _line(change: Change) -> str:
    what = f"{change.object} {change.path}".rstrip()
    values = f": {_value(change.old)} -> {_value(change.new)}" if change.path else ""
    along = "" if change.cause else " (comes along)"
    return f"{what}{values}{along}; {change.why}"


def _value(value: Any) -> str:
    return "nothing" if value is None else shown(value)


def _sizes(demand: Demand) -> str:
    return f"{demand.cpus:g} CPUs" + (f" and {demand.gpus:g} GPUs" if demand.gpus else "")
