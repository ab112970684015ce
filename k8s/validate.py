"""Strict validation against the CRDs, as an API server does it, without an API server.

In the API server's order: nulls that mean nothing are dropped, defaults are filled in, then types,
required fields, enums, patterns, bounds, uniqueness in list-maps and sets, and the CEL rules. Strict
means that unknown fields are refused, where the API server would drop them silently.

Structural schemas use a small part of JSON Schema. A keyword that isn't known here is an error of
ours and not passed over. Not checked: core objects (ConfigMap, NetworkPolicy, …), which no CRD
describes; rules about a change (`oldSelf`), since there is no older object; and CEL rules where
`common-expression-language` is not installed. `Report.unchecked` says which of these were met.

Knows nothing of what the operator refuses beyond the CRDs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cluster.errors import BadInput, shown
from k8s import schema as structural
from k8s.schema import Finding, Schema

__all__ = ["Crds", "Finding", "Report"]

# What the API server itself knows of `metadata`, of which a CRD says only that it is an object.
_STRINGS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA: Schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 253},
        "namespace": {"type": "string", "minLength": 1, "maxLength": 63},
        "labels": _STRINGS,
        "annotations": _STRINGS,
        "finalizers": {"type": "array", "items": {"type": "string"}, "x-kubernetes-list-type": "set"},
    },
    "required": ["name"],
}


class Report(NamedTuple):
    """What is wrong, and what could not be checked."""

    findings: tuple[Finding, ...]
    unchecked: frozenset[str]

    @property
    def valid(self) -> bool:
        """Whether nothing is wrong, as far as could be checked."""
        return not self.findings


class Crds:
    """The schemas of a set of CRDs, by apiVersion and kind."""

    def __init__(self, schemas: Mapping[tuple[str, str], Schema]) -> None:
        self._schemas = dict(schemas)

    @classmethod
    def load(cls, folder: Path) -> Crds:
        """Read every CRD in a folder's `*.yaml`.

        Raises:
            BadInput: the folder has none, or one can't be read.
        """
        schemas: dict[tuple[str, str], Schema] = {}
        for path in sorted(folder.glob("*.yaml")):
            try:
                with path.open("rb") as handle:
                    documents = list(yaml.load_all(handle, Loader=_fast_loader()))
                for crd in documents:
                    schemas.update(_versions(crd))
            except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
                raise BadInput(f"'{path}' is not a CRD", got=shown(str(error))) from None
        if not schemas:
            raise BadInput(
                f"no CRDs in '{folder}'", got="no *.yaml", allowed="KubeRay's CRDs, one or more a file"
            )
        return cls(schemas)

    def check(self, manifests: Iterable[Mapping[str, Any]]) -> Report:
        """Check objects; those of a `ray.io` kind that no CRD describes are findings."""
        findings: list[Finding] = []
        unchecked: set[str] = set()
        for manifest in manifests:
            version, kind = str(manifest.get("apiVersion")), str(manifest.get("kind"))
            schema = self._schemas.get((version, kind))
            where = f"{kind}/{_name(manifest)}"
            if schema is not None:
                found, missed = structural.check(copy.deepcopy(dict(manifest)), schema, where)
                findings += found
                unchecked |= missed
            elif version.partition("/")[0] in {group.partition("/")[0] for group, _ in self._schemas}:
                known = ", ".join(sorted(f"{v} {k}" for v, k in self._schemas))
                findings.append(Finding(where, "no such kind", f"{version} {kind}", known))
            else:
                unchecked.add(f"{version} {kind}")
        return Report(tuple(findings), frozenset(unchecked))

    def schema(self, version: str, kind: str) -> Schema:
        """One kind's schema, with the metadata that the API server checks filled in."""
        return self._schemas[version, kind]


def _versions(crd: Mapping[str, Any]) -> dict[tuple[str, str], Schema]:
    group, kind = crd["spec"]["group"], crd["spec"]["names"]["kind"]
    found = {}
    for version in crd["spec"]["versions"]:
        if version["served"]:
            schema = version["schema"]["openAPIV3Schema"]
            schema["properties"]["metadata"] = _METADATA
            found[f"{group}/{version['name']}", kind] = schema
    return found


def _name(manifest: Mapping[str, Any]) -> str:
    metadata = manifest.get("metadata")
    return str(metadata.get("name", "?")) if isinstance(metadata, Mapping) else "?"


def _fast_loader() -> type[Any]:
    """The C loader, where PyYAML was built with it: the CRDs are several megabytes."""
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)
