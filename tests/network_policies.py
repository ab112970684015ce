"""NetworkPolicies decided as Kubernetes decides them: who may reach whom at which port.

Policies add up: a pod that any policy selects for a direction takes or makes only what one of these allows.
Both ends must allow a connection.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

Tree = Mapping[str, Any]


class End(NamedTuple):
    """A pod by its labels and its namespace's name, or an address outside (`ip`)."""

    labels: Mapping[str, str] = {}
    namespace: str = "tandem"
    ip: str | None = None


def allowed(policies: Iterable[Tree], client: End, server: End, port: int, protocol: str = "TCP") -> bool:
    """Whether `client` may open a connection to `server`."""
    rules = list(policies)
    return _lets(rules, "Egress", client, server, port, protocol) and _lets(
        rules, "Ingress", server, client, port, protocol
    )


def _lets(policies: Sequence[Tree], way: str, own: End, other: End, port: int, protocol: str) -> bool:
    if own.ip is not None:
        return True
    chosen = [
        one["spec"]
        for one in policies
        if one["metadata"]["namespace"] == own.namespace
        and way in one["spec"]["policyTypes"]
        and _selects(one["spec"]["podSelector"], own.labels)
    ]
    peers, rules = ("to", "egress") if way == "Egress" else ("from", "ingress")
    return not chosen or any(
        _ports(rule.get("ports"), port, protocol) and _peers(rule.get(peers), own, other)
        for spec in chosen
        for rule in spec.get(rules) or []
    )


def _ports(ports: Sequence[Tree] | None, port: int, protocol: str) -> bool:
    return not ports or any(one["protocol"] == protocol and one["port"] == port for one in ports)


def _peers(peers: Sequence[Tree] | None, own: End, other: End) -> bool:
    return not peers or any(_peer(peer, own, other) for peer in peers)


def _peer(peer: Tree, own: End, other: End) -> bool:
    if "ipBlock" in peer:
        block = peer["ipBlock"]
        if other.ip is None:
            return False
        address = ipaddress.ip_address(other.ip)
        left_out = (ipaddress.ip_network(one) for one in block.get("except", ()))
        return address in ipaddress.ip_network(block["cidr"]) and not any(address in one for one in left_out)
    if other.ip is not None:
        return False
    if "namespaceSelector" in peer:
        if not _selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": other.namespace}):
            return False
    elif own.namespace != other.namespace:
        return False
    return _selects(peer.get("podSelector", {}), other.labels)


def _selects(selector: Tree, labels: Mapping[str, str]) -> bool:
    for key, value in (selector.get("matchLabels") or {}).items():
        if labels.get(key) != value:
            return False
    for one in selector.get("matchExpressions") or []:
        holds = {
            "In": labels.get(one["key"]) in one.get("values", ()),
            "Exists": one["key"] in labels,
        }[one["operator"]]
        if not holds:
            return False
    return True
