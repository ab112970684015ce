"""What applying manifests will do to what runs: in place, a new cluster, or nothing (drift).

The operator decides by a hash over `rayClusterConfig` that leaves out what its autoscaler writes, and by the
number of worker groups. Read in KubeRay 1.7 (`rayservice_controller.go`) and restated:

- the hash is the same: the running cluster stays as it is, so a change to a field that isn't hashed waits for
  the next cluster. Git and the cluster differ until then;
- the hash is the same once groups at the end of the list are left out: the running cluster gets the new
  spec;
- else a new cluster is built beside the old one, unless `upgradeStrategy.type` is None: then the change
  waits, while `serveConfigV2` is deployed to the old cluster all the same.

A running RayJob keeps the cluster that it began with. Other kinds are the API server's, and change in place.
Pure: two lists of objects in, a plan out.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from k8s.advice import advice, recommended_strategies
from k8s.changes import CLUSTER_FIELD, Change, Effect, Manifest, cluster_of, object_name, strategy_of
from k8s.demand import Demand, demand

_UNHASHED = re.compile(
    r"spec\.rayCluster(Config|Spec)\."
    r"(upgradeStrategy\b.*|(headGroupSpec|workerGroupSpecs\[\d+\])\.(replicas|minReplicas|maxReplicas"
    r"|scaleStrategy\.workersToDelete\b.*|template\.spec\.(tolerations|schedulingGates)\b.*))"
)
_LIVE = re.compile(
    r"spec\.(suspend|upgradeStrategy\b.*|workerGroupSpecs\[\d+\]\."
    r"(replicas|minReplicas|maxReplicas|suspend|scaleStrategy\b.*))"
)
_UNHASHED_IN_GROUP = ("replicas", "minReplicas", "maxReplicas")
_UNHASHED_IN_POD = ("tolerations", "schedulingGates")
_ZERO = Demand(0.0, 0.0)
_MAPS = {
    "annotations", "headServiceAnnotations", "labels", "limits", "matchLabels", "metadata", "nodeSelector",
    "rayStartParams", "requests", "resources", "scaleStrategy",
}  # fmt: skip
_FLAGS = {"hostIPC", "hostNetwork", "hostPID", "readOnly", "stdin", "stdinOnce", "tty"}
"""Of these, empty or false is the same as absent."""
_NOBODYS = ("kubectl.kubernetes.io/last-applied-configuration", "deployment.kubernetes.io/revision")
"""Annotations that tools leave behind."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What comes of applying the new manifests over the old ones."""

    changes: tuple[Change, ...]
    extra_at_first: Demand
    """What the pods of new clusters ask for beside the running ones, as they begin."""
    extra_at_most: Demand
    """And where their autoscaler takes every group to its end."""
    advice: tuple[str, ...]
    strategies: Mapping[str, str]
    """The `upgradeStrategy` that suits each RayService that gets a new cluster."""

    @property
    def effects(self) -> frozenset[Effect]:
        """All that will happen."""
        return frozenset(change.effect for change in self.changes)


def plan(old: Sequence[Manifest], new: Sequence[Manifest]) -> Plan:
    """Compare what runs with what is to be applied.

    Args:
        old: objects as they were applied last, of any kinds.
        new: objects that are to be applied.
    """
    before, after = _by_name(old), _by_name(new)
    changes: list[Change] = []
    first, most = _ZERO, _ZERO
    for name in [*after, *(name for name in before if name not in after)]:
        one, other = before.get(name), after.get(name)
        if one is None:
            changes.append(Change(name, "", None, "all of it", "new object", "it isn't there yet"))
        elif other is None:
            why = "kubectl apply deletes nothing; delete it by hand once nothing refers to it"
            changes.append(Change(name, "", "all of it", None, "left behind", why))
        else:
            found = list(_changes(name, one, other))
            changes += found
            if other.get("kind") in CLUSTER_FIELD and any(one.effect == "new cluster" for one in found):
                at_first, at_most = _extra(other)
                first, most = first + at_first, most + at_most
    return Plan(
        tuple(changes), first, most, tuple(advice(changes, after)), recommended_strategies(changes, after)
    )


def _by_name(objects: Sequence[Manifest]) -> dict[str, Manifest]:
    return {object_name(one): one for one in objects}


def _changes(name: str, old: Manifest, new: Manifest) -> Iterator[Change]:
    """The fields of one object that differ, and what comes of each."""
    if new.get("kind") == "RayCluster":
        for path, one, other in _differences(_without_empty(applied(old)), _without_empty(applied(new)), ""):
            yield Change(name, path, one, other, *_of_plain_cluster(path, one, old, new))
        return
    of_cluster, why_cluster = _of_cluster(old, new)
    cluster = f"spec.{CLUSTER_FIELD.get(str(new.get('kind')), '-')}"
    before, after = applied(old), applied(new)
    if str(new.get("kind")) in CLUSTER_FIELD:
        before, after = _without_empty(before), _without_empty(after)
    for path, one, other in _differences(before, after, ""):
        if path == cluster or path.startswith((f"{cluster}.", f"{cluster}[")):
            cause = of_cluster != "new cluster" or _UNHASHED.fullmatch(path) is None
            yield Change(name, path, one, other, of_cluster, why_cluster, cause)
        else:
            effect, why = _outside(path, new)
            yield Change(name, path, one, other, effect, why)


def _of_cluster(old: Manifest, new: Manifest) -> tuple[Effect, str]:
    """What comes of any difference between two clusters."""
    kind = str(new.get("kind"))
    if kind == "RayJob":
        return "waits", "a running job keeps its cluster; the next attempt gets the new one"
    if kind != "RayService":
        return "in place", "the cluster's own object is changed"
    one, other = (copy.deepcopy(dict(cluster_of(manifest))) for manifest in (old, new))
    groups, wanted = one.get("workerGroupSpecs") or [], other.get("workerGroupSpecs") or []
    if _hashed(one) == _hashed(other):
        return "waits", "the operator doesn't look at this field; the next new cluster has it"
    if len(wanted) > len(groups):
        other["workerGroupSpecs"] = wanted[: len(groups)]
        if _hashed(one) == _hashed(other):
            return "in place", "worker groups added at the end of the list join the running cluster"
    if strategy_of(new) == "None":
        return "waits", "upgradeStrategy.type is None: no new cluster, though serveConfigV2 is deployed"
    return "new cluster", "the operator builds a new cluster beside the running one, and moves over to it"


def _of_plain_cluster(path: str, old_value: Any, old: Manifest, new: Manifest) -> tuple[Effect, str]:
    """What comes of a difference in a RayCluster that stands alone."""
    if path.startswith("metadata.") or not path.startswith("spec."):
        return "in place", "read whenever it changes"
    if _LIVE.fullmatch(path):
        return "in place", "pods are made and deleted until there are as many"
    if old_value is None and re.fullmatch(r"spec\.workerGroupSpecs\[\d+\]", path):
        return "in place", "a group added at the end joins the running cluster"
    one, other = (manifest.get("spec") or {} for manifest in (old, new))
    if strategy_of(new) == "Recreate" and _hashed(one) != _hashed(other):
        return "new cluster", "upgradeStrategy.type is Recreate: all pods are deleted, then made anew"
    return "waits", "pods keep what they were made with; those made later have it"


def _outside(path: str, new: Manifest) -> tuple[Effect, str]:
    """What comes of a difference outside the cluster."""
    kind = new.get("kind")
    if kind == "RayService" and path.startswith(("metadata.labels", "metadata.annotations")):
        return "waits", "copied to a cluster when it is made"
    if kind == "RayService" and path.startswith("spec.serveConfigV2"):
        return "in place", "Serve replaces the replicas of what changed, a few at a time"
    if kind == "RayJob" and path.startswith("spec.") and path != "spec.suspend":
        return "waits", "read when the job begins"
    if kind in ("CronJob", "RayCronJob"):
        return "in place", "holds from the next time on; what runs goes on as it is"
    return "in place", "read whenever it changes"


def applied(manifest: Manifest) -> dict[str, Any]:
    """What an author writes: no status, and of the metadata labels and annotations alone."""
    metadata = manifest.get("metadata") or {}
    kept: dict[str, Any] = {}
    for field in ("labels", "annotations"):
        written = metadata.get(field) or {}
        if said := {key: value for key, value in written.items() if key not in _NOBODYS}:
            kept[field] = said
    rest = {key: value for key, value in manifest.items() if key not in ("status", "metadata")}
    return {"metadata": kept, **rest}


def _hashed(cluster: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that the operator's hash covers."""
    kept = copy.deepcopy({key: value for key, value in cluster.items() if key != "upgradeStrategy"})
    for group in [kept.get("headGroupSpec") or {}, *(kept.get("workerGroupSpecs") or [])]:
        for field in _UNHASHED_IN_GROUP:
            group.pop(field, None)
        (group.get("scaleStrategy") or {}).pop("workersToDelete", None)
        pod = (group.get("template") or {}).get("spec") or {}
        for field in _UNHASHED_IN_POD:
            pod.pop(field, None)
    pruned: Mapping[str, Any] = _without_empty(kept)
    return pruned


def _without_empty(value: Any) -> Any:
    """A tree as the operator writes it to be hashed, from Go's types: what says nothing isn't there.

    Nulls, empty lists, empty maps. An empty object is kept where Go has a pointer (`emptyDir: {}`).
    """
    if isinstance(value, Mapping):
        items = ((key, _without_empty(one)) for key, one in value.items())
        return {key: one for key, one in items if not _says_nothing(key, one)}
    return [_without_empty(one) for one in value] if isinstance(value, list) else value


def _says_nothing(key: str, value: Any) -> bool:
    if value is None or value == []:
        return True
    return (value == {} and key in _MAPS) or (value is False and key in _FLAGS)


def _differences(old: Any, new: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Paths at which two trees differ; an absent value is None."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(key for key in new if key not in old)]:
            deeper = f"{path}.{key}" if path else str(key)
            yield from _differences(old.get(key), new.get(key), deeper)
    elif isinstance(old, list) and isinstance(new, list):
        for place in range(max(len(old), len(new))):
            one = old[place] if place < len(old) else None
            other = new[place] if place < len(new) else None
            yield from _differences(one, other, f"{path}[{place}]")
    elif old != new:
        yield path, old, new


def _extra(new: Manifest) -> tuple[Demand, Demand]:
    """What a new cluster asks for beside the old one: as it begins, and at most."""
    cluster = cluster_of(new)
    head = demand(cluster.get("headGroupSpec") or {})
    low, high = _ZERO, _ZERO
    for group in cluster.get("workerGroupSpecs") or []:
        each = demand(group)
        least, most = int(group.get("minReplicas") or 0), int(group.get("maxReplicas") or 0)
        begins = max(least, int(group.get("replicas") or 0))
        low += each * begins
        high += each * max(most, begins)
    if strategy_of(new) == "NewClusterWithIncrementalUpgrade":
        options = new["spec"]["upgradeStrategy"].get("clusterUpgradeOptions") or {}
        surge = float(options.get("maxSurgePercent", 100)) / 100
        return head + low, head + low + (high - low) * surge
    return head + low, head + high
