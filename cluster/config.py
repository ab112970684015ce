"""From a YAML file to a frozen, checked object, with errors that name the line.

Recipes and services are subclasses of `Frozen`: unknown keys are refused, nothing is coerced
silently, and a mistake is reported with file, line, field, value and what is allowed. `overrides`
are the `key=value` words of the command line: `workers.max=4`.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, ErrorDetails

from cluster.errors import BadInput, shown

MAX_FILE_BYTES = 1024 * 1024
MAX_DEPTH = 50


def _make_numbers_strict(schema: Any) -> None:
    """In the schema of one model's fields; models below it are references, and see to their own."""
    if isinstance(schema, dict):
        is_schema = isinstance(schema.get("type"), str)  # otherwise a mapping of fields by name
        if is_schema and schema["type"] in ("int", "float"):
            schema["strict"] = True
        for name, part in schema.items():
            # A key in JSON is always a text, and how a value is written is no matter of reading it.
            if not (is_schema and name in ("metadata", "serialization", "keys_schema")):
                _make_numbers_strict(part)
    elif isinstance(schema, list):
        for part in schema:
            _make_numbers_strict(part)


class Frozen(BaseModel):
    """The base of everything configured or written as JSON: immutable, unknown keys refused.

    A number must be one: true and "5" are not 1 and 5. (An integer does for a float.) Pydantic's strict
    mode would also refuse what JSON and YAML can't write otherwise, as lists for tuples and texts for
    dates, so only numbers are made strict.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        _make_numbers_strict(handler.resolve_ref_schema(schema))
        return schema


F = TypeVar("F", bound=Frozen)


def load_yaml(model: type[F], path: Path, overrides: Sequence[str] = ()) -> F:
    """Read `path` as a `model`, with `overrides` (`dotted.key=value`) laid over it.

    Raises:
        BadInput: the file can't be read, isn't YAML, or breaks a rule; every broken rule is listed.
    """
    return parse_yaml(model, _text_of(path), str(path), overrides)


def parse_yaml(model: type[F], text: str, source: str, overrides: Sequence[str] = ()) -> F:
    """As `load_yaml`, from a string; `source` names it in errors."""
    try:
        tree = _compose(text)
        data = {} if tree is None else _constructed(tree)
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        raise BadInput(
            f"{where} is not YAML that we take", got=shown(_problem(error)), allowed="plain YAML 1.1"
        ) from None
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


class _Loader(yaml.SafeLoader):
    """Takes 1e-3 for a number, as YAML 1.2 and everyone who writes it do; to YAML 1.1 it is a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+\Z"), list("-+0123456789")
)


def _without_waiting(path: str, flags: int) -> int:
    """Opening a pipe would otherwise last until somebody writes to it."""
    return os.open(path, flags | os.O_NONBLOCK)


def _text_of(path: Path) -> str:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadInput(
                    f"'{path}' is not a file",
                    got="a folder, a device or a pipe",
                    allowed="a YAML file in UTF-8",
                    fix="write it to a file, and name that",
                )
            data = file.read(MAX_FILE_BYTES + 1)  # its size says little: a file may grow
        if len(data) > MAX_FILE_BYTES:
            raise BadInput(
                f"'{path}' is too large",
                got=f"more than {MAX_FILE_BYTES} bytes",
                allowed=f"at most {MAX_FILE_BYTES} bytes",
            )
        return data.decode("utf-8")
    except (OSError, ValueError) as error:
        raise BadInput(
            f"'{path}' can't be read", got=shown(str(error)), allowed="a YAML file in UTF-8"
        ) from None


def _compose(text: str) -> yaml.Node | None:
    """The text as a tree of nodes, which know their lines; None for an empty text."""
    _refuse_tricks(text)
    tree = yaml.compose(text, Loader=_Loader)
    if tree is not None:
        _refuse_repeats(tree)
    return tree


def _constructed(tree: yaml.Node) -> Any:
    return _Loader("").construct_document(tree)


def _refuse_tricks(text: str) -> None:
    """Refuse what a file of settings has no use for: aliases can expand without end, tags can construct
    what nobody expects, and deep nesting exhausts the stack."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            _refuse("an alias ('*')", event)
        if isinstance(event, yaml.NodeEvent) and getattr(event, "tag", None):
            _refuse("a tag ('!')", event)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            _refuse(f"more than {MAX_DEPTH} levels", event)


def _refuse_repeats(node: yaml.Node) -> None:
    """YAML lets a later key silently win over an earlier one; a typo must not."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                _refuse("a key that is not a word", key)
            if key.value in seen:
                _refuse(f"key '{key.value}' twice", key)
            seen.add(key.value)
            _refuse_repeats(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeats(item)


def _refuse(problem: str, where: Any) -> NoReturn:
    """Refuse a node or an event, at its line."""
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=where.start_mark)


def _problem(error: Exception) -> str:
    return getattr(error, "problem", None) or str(error) or type(error).__name__


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
            raise BadInput(f"'{name}' has no keys below it, so '{path}' can't be set", got=shown(data))
    try:
        tree = _compose(text)
        data[last] = None if tree is None else _constructed(tree)
    except (yaml.YAMLError, ValueError) as error:
        raise BadInput(
            f"the value of '{path}' on the command line is not YAML that we take",
            got=shown(text),
            allowed=f"plain YAML 1.1 ({_problem(error)})",
            fix="put it in quotes",
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
