"""From a YAML file to a frozen, checked object, with errors that name the line.

Recipes and services are subclasses of `Frozen`: unknown keys are refused, nothing is coerced
silently, and a mistake is reported with file, line, field, value and what is allowed. `overrides`
are the `key=value` words of the command line: `workers.max=4`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from cluster.errors import BadInput, shown

MAX_FILE_BYTES = 1024 * 1024


class Frozen(BaseModel):
    """The base of everything configured or written as JSON: immutable, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


F = TypeVar("F", bound=Frozen)


def load_yaml(model: type[F], path: Path, overrides: Sequence[str] = ()) -> F:
    """Read `path` as a `model`, with `overrides` (`dotted.key=value`) laid over it.

    Raises:
        BadInput: the file can't be read, isn't YAML, or breaks a rule; every broken rule is listed.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise BadInput(
                f"'{path}' is too large",
                got=f"{path.stat().st_size} bytes",
                allowed=f"at most {MAX_FILE_BYTES} bytes",
            )
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise BadInput(
            f"'{path}' can't be read", got=shown(str(error)), allowed="a YAML file in UTF-8"
        ) from None
    return parse_yaml(model, text, str(path), overrides)


def parse_yaml(model: type[F], text: str, source: str, overrides: Sequence[str] = ()) -> F:
    """As `load_yaml`, from a string; `source` names it in errors."""
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        data = {} if tree is None else _plain(tree)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error) or type(error).__name__
        raise BadInput(f"{where} is not YAML", got=shown(problem), allowed="YAML 1.1") from None
    if not isinstance(data, dict):
        raise BadInput(f"{source} is not a mapping", got=type(data).__name__, allowed="key: value lines")
    for override in overrides:
        _lay_over(data, override)
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _explained(error, model, tree, source, overrides) from None


def validated(model: type[F], data: Mapping[str, Any], source: str) -> F:
    """As `load_yaml`, from values already read; `source` names them in errors.

    Raises:
        BadInput: a rule is broken; every broken rule is listed.
    """
    try:
        return model.model_validate(dict(data))
    except ValidationError as error:
        raise _explained(error, model, None, source, ()) from None


def _plain(tree: yaml.Node) -> Any:
    _refuse_repeats(tree)
    return yaml.SafeLoader("").construct_document(tree)


def _refuse_repeats(node: yaml.Node) -> None:
    """YAML lets a later key silently win over an earlier one; a typo must not."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key '{key.value}' twice", problem_mark=key.start_mark)
            seen.add(key.value)
            _refuse_repeats(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeats(item)


def _lay_over(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise BadInput(
            "an override can't be read",
            got=shown(override),
            allowed="key=value, or outer.inner=value",
            fix="write for example workers.max=4",
        )
    *outer, last = path.split(".")
    for name in outer:
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            raise BadInput(f"'{name}' in '{override}' has no keys below it", got=shown(data))
    try:
        data[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise BadInput(
            f"the value in '{override}' is not YAML", got=shown(text), fix="put it in quotes"
        ) from None


def _explained(
    error: ValidationError, model: type[Frozen], tree: yaml.Node | None, source: str, overrides: Sequence[str]
) -> BadInput:
    problems = error.errors(include_url=False)
    lines = [_one_problem(p, model, tree, source, overrides) for p in problems]
    more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
    first, *others = lines
    return BadInput(
        first["failed"] + more,
        got=first["got"],
        allowed=first["allowed"],
        fix=first["fix"]
        + "".join(f"\n  also:    {p['failed']}: got {p['got']}; {p['allowed']}" for p in others[:20]),
    )


def _one_problem(
    problem: ErrorDetails, model: type[Frozen], tree: yaml.Node | None, source: str, overrides: Sequence[str]
) -> dict[str, str]:
    location = [part for part in problem["loc"] if not str(part).startswith(("function-", "tagged-"))]
    dotted = ".".join(str(part) for part in location)
    overridden = any(override.partition("=")[0] == dotted for override in overrides)
    line = None if overridden else _line_of(tree, location)
    where = "the command line" if overridden else f"{source}:{line}" if line else source
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    fix = f"correct '{dotted}'" if dotted else "correct the file"
    if problem["type"] == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        message = "one of " + ", ".join(known) if known else "no such key"
        fix = f"did you mean '{near[0]}'?" if near else f"remove '{dotted}'"
        got = f"unknown key '{location[-1]}'"
    elif problem["type"] == "missing":
        message, got, fix = "a value is required", "nothing", f"add '{dotted}'"
    else:
        got = shown(problem["input"])
    subject = f"'{dotted}' in {where}" if dotted else where
    return {"failed": f"{subject} is not right", "got": got, "allowed": message, "fix": fix}


def _line_of(tree: yaml.Node | None, location: Sequence[str | int]) -> int | None:
    """The line, counted from 1, of the deepest node on the way to `location`."""
    node, line = tree, None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _fields_at(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """The keys allowed in the model that stands at `location`, as far as its annotations tell."""
    current: Any = model
    for part in location:
        if isinstance(part, int):
            continue
        if not (isinstance(current, type) and issubclass(current, BaseModel)):
            return []
        field = current.model_fields.get(str(part))
        current = _inner_model(field.annotation) if field else None
    if isinstance(current, type) and issubclass(current, BaseModel):
        return list(current.model_fields)
    return []


def _inner_model(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        if found := _inner_model(argument):
            return found
    return None
