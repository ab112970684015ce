"""All that can be said of manifests without a cluster, layer by layer: `tandem k8s lint`.

1. the CRDs: schema, unknown fields and CEL, as the API server checks them (`k8s.validate`);
2. the operator's own rules (`k8s.lint.operator`);
3. what only shows across objects (`across`), and Pod Security on the pods as they will be (`restricted`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from k8s.launch import RAYJOB_FILE
from k8s.lint.across import across
from k8s.lint.finding import Finding
from k8s.lint.gated import gates
from k8s.lint.operator import refused
from k8s.lint.restricted import not_restricted
from k8s.validate import Crds


class Linted(NamedTuple):
    """What is wrong, and what could not be checked."""

    findings: tuple[Finding, ...]
    unchecked: tuple[str, ...]


def lint(manifests: Sequence[Mapping[str, Any]], crds: Crds | None) -> Linted:
    """Check manifests in every layer.

    Args:
        crds: KubeRay's; None leaves the first layer out, and says so.
    """
    manifests = [*manifests, *_launched(manifests)]
    findings: list[Finding] = []
    unchecked: list[str] = []
    if crds is None:
        unchecked.append("schemas and CEL rules: give the folder of KubeRay's CRDs with --crds")
    else:
        report = crds.check(manifests)
        findings += [Finding(*one, "see `kubectl explain` of the field") for one in report.findings]
        unchecked += sorted(report.unchecked)
    for manifest in manifests:
        if str(manifest.get("apiVersion")).startswith("ray.io/"):
            findings += refused(manifest)
            unchecked += gates(manifest)
        findings += not_restricted(manifest)
    findings += across(manifests)
    return Linted(tuple(findings), tuple(unchecked))


def _launched(manifests: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The RayJobs that schedules will make, out of the ConfigMaps in which they lie."""
    for manifest in manifests:
        text = (manifest.get("data") or {}).get(RAYJOB_FILE) if manifest.get("kind") == "ConfigMap" else None
        if text is not None:
            with contextlib.suppress(ValueError, TypeError):
                yield json.loads(text)
