"""ValidatingAdmissionPolicies evaluated by a real CEL, as the API server would on a create."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import cel

Tree = Mapping[str, Any]
PLURALS = {
    "RayCluster": "rayclusters",
    "RayService": "rayservices",
    "RayJob": "rayjobs",
    "RayCronJob": "raycronjobs",
}


def refusals(policies: Iterable[Tree], manifest: Tree) -> list[str]:
    """The messages of all validations that don't hold for an object.

    An expression that can't be evaluated refuses, too: that is what `failurePolicy: Fail` says.
    """
    found = []
    for policy in policies:
        if policy["kind"] != "ValidatingAdmissionPolicy" or not _matches(policy, manifest):
            continue
        assert policy["spec"]["failurePolicy"] == "Fail"
        variables: dict[str, Any] = {}
        scope = {"object": dict(manifest), "oldObject": None, "variables": variables}
        for one in policy["spec"].get("variables", []):
            variables[one["name"]] = _value(one["expression"], scope)
        for one in policy["spec"]["validations"]:
            if _value(one["expression"], scope) is not True:
                found.append(one["message"])
    return found


def _matches(policy: Tree, manifest: Tree) -> bool:
    group, _, version = str(manifest["apiVersion"]).rpartition("/")
    return any(
        group in rule["apiGroups"]
        and ({"*", version} & set(rule["apiVersions"]))
        and "CREATE" in rule["operations"]
        and PLURALS.get(str(manifest["kind"])) in rule["resources"]
        for rule in policy["spec"]["matchConstraints"]["resourceRules"]
    )


def _value(expression: str, scope: dict[str, Any]) -> Any:
    try:
        return cel.evaluate(expression, scope)
    except (RuntimeError, ValueError, TypeError) as error:
        return f"can't be evaluated: {error}"
