"""What KubeRay's operator refuses although the CRDs let it pass: its own rules, restated from 1.7's source.

`validation.go` at v1.7.0 is where they stand; here they are told apart by what they are about. A
manifest that breaks one is accepted by the API server and then never acted upon.

Knows plain data; knows nothing of Tandem.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from zoneinfo import available_timezones

from k8s.cron import checked_cron
from k8s.lint.finding import Finding
from k8s.lint.of_cluster import cluster_rules
from k8s.lint.of_job import job_rules
from k8s.lint.of_service import service_rules

Tree = Mapping[str, Any]

LONGEST_NAMES = {"RayCluster": 53, "RayService": 47, "RayJob": 47, "RayCronJob": 36}
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def refused(manifest: Tree) -> Iterator[Finding]:
    """Everything that the operator would refuse in one `ray.io` object."""
    kind = str(manifest.get("kind"))
    spec, name = manifest.get("spec") or {}, (manifest.get("metadata") or {}).get("name")
    where = f"{kind}/{name}"
    yield from _name(kind, str(name or ""), where)
    if kind == "RayCluster":
        yield from cluster_rules(spec, f"{where}.spec", manifest, standalone=True)
    elif kind == "RayService":
        yield from service_rules(spec, f"{where}.spec", manifest)
    elif kind == "RayJob":
        yield from job_rules(spec, f"{where}.spec", manifest)
    elif kind == "RayCronJob":
        yield from _schedule(spec, f"{where}.spec")
        yield from job_rules(spec.get("jobTemplate") or {}, f"{where}.spec.jobTemplate", manifest)


def _schedule(spec: Tree, where: str) -> Iterator[Finding]:
    try:
        checked_cron(str(spec.get("schedule")))
    except ValueError as error:
        yield Finding(
            f"{where}.schedule", "no cron expression", str(spec.get("schedule")), str(error), "mend it"
        )
    zone, known = spec.get("timeZone"), available_timezones()
    if zone is not None and known and zone not in known:
        yield Finding(
            f"{where}.timeZone",
            "no such time zone",
            str(zone),
            "such as Europe/Berlin",
            "use a name of IANA's",
        )


def _name(kind: str, name: str, where: str) -> Iterator[Finding]:
    longest = LONGEST_NAMES.get(kind)
    if longest is None:
        return
    if len(name) > longest:
        yield Finding(
            f"{where}.metadata.name",
            "the name is too long for the objects that are named after it",
            f"{len(name)} characters",
            f"at most {longest}",
            "shorten it",
        )
    if not _DNS_1035.fullmatch(name):
        yield Finding(
            f"{where}.metadata.name",
            "the name can't be a host's",
            repr(name),
            "small letters, digits and '-', a letter first (DNS-1035)",
            "rename it",
        )
