"""A Kubernetes structural schema applied to one object: null-pruning, defaulting, checking.

One walk that goes along schema and value together, so every finding knows its path. The object
given is changed: nulls are dropped and defaults filled in, as the API server would store it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from cluster.errors import shown
from k8s import cel

Schema = dict[str, Any]

_RANGES = {"int32": 2**31, "int64": 2**63}
_KNOWN = {
    "type", "format", "nullable", "default", "enum", "properties", "required", "additionalProperties",
    "items", "anyOf", "pattern", "minLength", "maxLength", "minItems", "maxItems", "minimum", "maximum",
    "title", "description", "example", "x-kubernetes-int-or-string", "x-kubernetes-list-type",
    "x-kubernetes-list-map-keys", "x-kubernetes-map-type", "x-kubernetes-validations",
    "x-kubernetes-preserve-unknown-fields",
}  # fmt: skip
_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}


class Finding(NamedTuple):
    """One broken rule: where, what is wrong, the value got, the value allowed."""

    path: str
    problem: str
    got: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}: got {self.got}; allowed: {self.allowed}"


def check(value: Any, schema: Schema, path: str) -> tuple[list[Finding], set[str]]:
    """Everything that breaks `schema` in `value`, and the rules that could not be checked.

    Args:
        value: plain data; nulls are dropped and defaults filled in, in place.
        schema: a structural schema.
        path: what to call the root in findings.
    """
    walk = _Walk()
    _fill_in(value, schema)
    walk.visit(value, schema, path)
    return walk.findings, walk.unchecked


def _fill_in(value: Any, schema: Schema) -> None:
    """Drop nulls where the schema has no use for them, then fill in defaults."""
    if isinstance(value, dict):
        known: dict[str, Schema] = schema.get("properties", {})
        more = schema.get("additionalProperties")
        for name in list(value):
            field = known.get(name, more if isinstance(more, dict) else {})
            if value[name] is None and field and not field.get("nullable"):
                del value[name]
        for name, field in known.items():
            if name not in value and "default" in field:
                value[name] = _copy(field["default"])
        for name, child in value.items():
            below = known.get(name, more)
            if isinstance(below, dict):
                _fill_in(child, below)
    elif isinstance(value, list) and "items" in schema:
        for item in value:
            _fill_in(item, schema["items"])


def _copy(default: Any) -> Any:
    if isinstance(default, dict):
        return {name: _copy(child) for name, child in default.items()}
    return [_copy(child) for child in default] if isinstance(default, list) else default


class _Walk:
    """One walk's findings."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.unchecked: set[str] = set()

    def visit(self, value: Any, schema: Schema, path: str) -> None:
        assert schema.keys() <= _KNOWN, f"schema keyword not known: {sorted(schema.keys() - _KNOWN)}"
        assert "anyOf" not in schema or "x-kubernetes-int-or-string" in schema, "anyOf means int or string"
        if value is None and schema.get("nullable"):
            return
        if not self._has_type(value, schema, path):
            return
        if "enum" in schema and value not in schema["enum"]:
            self._add(path, "not one of the values", value, ", ".join(map(str, schema["enum"])))
        if isinstance(value, dict):
            self._object(value, schema, path)
        elif isinstance(value, list):
            self._array(value, schema, path)
        elif isinstance(value, str):
            self._string(value, schema, path)
        elif not isinstance(value, bool):
            self._number(value, schema, path)
        self._rules(value, schema, path)

    def _has_type(self, value: Any, schema: Schema, path: str) -> bool:
        if schema.get("x-kubernetes-int-or-string"):
            wanted = ["integer", "string"]
        elif "type" in schema:
            wanted = [schema["type"]]
        else:
            return True
        if any(_TYPES[name](value) for name in wanted):
            return True
        self._add(path, "wrong type", value, " or ".join(wanted))
        return False

    def _object(self, value: dict[str, Any], schema: Schema, path: str) -> None:
        known: dict[str, Schema] = schema.get("properties", {})
        more = schema.get("additionalProperties")
        for name in schema.get("required", ()):
            if name not in value:
                self._add(path, f"'{name}' is missing", "nothing", "a value")
        for name, child in value.items():
            below = f"{path}.{name}"
            if name in known:
                self.visit(child, known[name], below)
            elif isinstance(more, dict):
                self.visit(child, more, below)
            elif more is not True and not schema.get("x-kubernetes-preserve-unknown-fields"):
                self._add(below, "unknown field", child, ", ".join(sorted(known)) or "no field at all")

    def _array(self, value: list[Any], schema: Schema, path: str) -> None:
        self._bounds(len(value), schema, "Items", path, "items")
        for index, item in enumerate(value):
            self.visit(item, schema.get("items", {}), f"{path}[{index}]")
        kind = schema.get("x-kubernetes-list-type")
        if kind not in ("map", "set"):
            return
        keys: list[str] = schema.get("x-kubernetes-list-map-keys", [])
        seen: list[Any] = []
        for index, item in enumerate(value):
            if kind == "map" and not isinstance(item, dict):
                continue  # of the wrong type, which is said already
            identity = [item.get(key) for key in keys] if kind == "map" else item
            if identity in seen:
                what = ", ".join(keys) or "itself"
                self._add(f"{path}[{index}]", "twice in the list", identity, f"each {what} once")
            seen.append(identity)

    def _string(self, value: str, schema: Schema, path: str) -> None:
        self._bounds(len(value), schema, "Length", path, "characters")
        if "pattern" in schema and not re.search(schema["pattern"], value):
            self._add(path, "doesn't follow the pattern", value, schema["pattern"])

    def _number(self, value: float, schema: Schema, path: str) -> None:
        self._bounds(value, schema, "imum", path, "")
        limit = _RANGES.get(schema.get("format", ""))
        if limit is not None and not -limit <= value < limit:
            self._add(path, f"no {schema['format']}", value, f"{-limit} to {limit - 1}")

    def _bounds(self, value: float, schema: Schema, what: str, path: str, unit: str) -> None:
        low, high = schema.get(f"min{what}"), schema.get(f"max{what}")
        if low is not None and value < low:
            self._add(path, "too little", value, f"at least {low} {unit}".strip())
        if high is not None and value > high:
            self._add(path, "too much", value, f"at most {high} {unit}".strip())

    def _rules(self, value: Any, schema: Schema, path: str) -> None:
        for rule in schema.get("x-kubernetes-validations", ()):
            if "oldSelf" in rule["rule"]:
                self.unchecked.add(f"about a change: {rule['rule']}")
            elif not cel.available():
                self.unchecked.add(f"CEL: {rule['rule']}")
            elif not cel.holds(rule["rule"], value):
                self._add(path, "breaks a rule", value, rule.get("message", rule["rule"]))

    def _add(self, path: str, problem: str, got: Any, allowed: str) -> None:
        self.findings.append(Finding(path, problem, shown(got), allowed))
