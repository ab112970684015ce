"""Files are read strictly, and every mistake names its line, its value and what is allowed."""

import contextlib
import json
import os
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from cluster.config import MAX_FILE_BYTES, Frozen, load_yaml, parse_yaml
from cluster.errors import BadInput


class Inner(Frozen):
    size: int = Field(1, ge=1)
    kind: Literal["small", "large"] = "small"


class Outer(Frozen):
    name: str
    inner: Inner = Inner()
    items: tuple[Inner, ...] = ()
    ratio: float | None = None


def refused(text: str, *overrides: str) -> BadInput:
    with pytest.raises(BadInput) as caught:
        parse_yaml(Outer, text, "file.yaml", overrides)
    return caught.value


def test_a_right_file_is_read_with_its_overrides() -> None:
    text = "name: a\ninner: {size: 2}\nitems:\n  - size: 3\n"
    outer = parse_yaml(Outer, text, "f", ["inner.kind=large", "ratio=0.5", "inner.size=7", 'name="7"'])
    assert outer == Outer(name="7", inner=Inner(size=7, kind="large"), items=(Inner(size=3),), ratio=0.5)


@pytest.mark.parametrize(
    ("text", "line", "field"),
    [
        ("name: a\n\ninner:\n  size: 0\n", 4, "inner.size"),
        ("name: a\nitems:\n  - size: 1\n  - size: none\n", 4, "items.1.size"),
        ("name: a\nratio: .nan\n", 2, "ratio"),
        ("# a comment\nname: [1]\n", 2, "name"),
        ("name: a\ninner: 3\n", 2, "inner"),
    ],
)
def test_a_broken_rule_names_its_line(text: str, line: int, field: str) -> None:
    error = refused(text)
    assert f"'{field}' in file.yaml:{line} " in error.failed
    assert error.got
    assert error.allowed
    assert error.fix


def test_an_unknown_key_suggests_the_near_one() -> None:
    error = refused("name: a\ninner: {siez: 3}\n")
    assert error.got == "unknown key 'siez'"
    assert error.fix == "did you mean 'size'?"
    assert "kind" in error.allowed
    assert refused("name: a\nitems: [{siez: 3}]\n").fix == "did you mean 'size'?"


def test_a_missing_key_is_asked_for() -> None:
    assert refused("ratio: 1.0\n").fix == "add 'name'"
    assert refused("").fix == "add 'name'"


def test_every_broken_rule_is_listed() -> None:
    error = refused("name: a\nratio: x\ninner: {size: 0, kind: huge}\n")
    assert "(and 2 more)" in error.failed
    assert error.fix.count("also:") == 2


class Numbers(Frozen):
    count: int = Field(1, ge=0)
    rate: float | None = None
    sizes: tuple[int, ...] = ()
    metadata: dict[str, float] = {}


@pytest.mark.parametrize(
    "values",
    [
        *({"count": value} for value in (True, "5", 5.5)),
        *({"rate": value} for value in (True, "1.5")),
        *({"sizes": [value]} for value in (False, "5")),
        *({"metadata": {"a": value}} for value in (True, "5")),
    ],
)
def test_nothing_is_taken_for_a_number_that_is_none(values: dict[str, object]) -> None:
    with pytest.raises(BadInput):
        parse_yaml(Numbers, json.dumps(values), "f")
    with pytest.raises(BadInput):
        parse_yaml(Numbers, "", "f", [f"{key}={json.dumps(value)}" for key, value in values.items()])
    with pytest.raises(ValidationError):
        Numbers.model_validate_json(json.dumps(values))


def test_numbers_come_back_from_json_and_as_people_write_them() -> None:
    numbers = parse_yaml(Numbers, "count: 2\nrate: 1e-3\nsizes: [1, 2]\nmetadata: {a: 1, b: 2.5e3}", "f")
    assert numbers == Numbers(count=2, rate=0.001, sizes=(1, 2), metadata={"a": 1.0, "b": 2500.0})
    assert Numbers.model_validate_json(numbers.model_dump_json()) == numbers
    assert parse_yaml(Numbers, "", "f", ["rate=3E4"]).rate == 30000


def test_a_key_given_twice_is_refused_at_any_depth() -> None:
    assert "file.yaml:2" in refused("name: a\nname: b\n").failed
    assert "twice" in refused("name: a\ninner: {size: 1, size: 2}\n").got
    assert "twice" in refused("name: a\nitems:\n - size: 1\n   size: 2\n").got


def test_a_wrong_override_names_the_command_line() -> None:
    assert "the command line" in refused("name: a\n", "inner.size=0").failed
    for override in ("inner.size", "=1", ".a=1", "inner..size=1"):
        assert refused("name: a\n", override).fix == "write for example workers.max=4"
    assert "no keys below it" in refused("name: a\n", "name.x=1").failed
    assert "not YAML" in refused("name: a\n", "name=[").failed


@pytest.mark.parametrize(
    "text", ["[1, 2]", "just words", "a: b: c", "\t- x", "!!python/object:os.system {}", "a: *b"]
)
def test_what_is_not_a_mapping_is_refused(text: str) -> None:
    refused(text)


def test_an_alias_bomb_is_refused() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert "alias" in refused("\n".join(lines)).got


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    big, binary = tmp_path / "big", tmp_path / "binary"
    big.write_text("#" * (MAX_FILE_BYTES + 1))
    binary.write_bytes(b"\xff\xfe\x00")
    os.mkfifo(tmp_path / "pipe")
    devices = (Path("/dev/zero"), Path("/dev/null"), tmp_path / "pipe")
    for path in (big, binary, tmp_path, tmp_path / "none", Path("a\0b"), *devices):
        with pytest.raises(BadInput):
            load_yaml(Outer, path)


YAML_BITS = [
    "name",
    "inner",
    "items",
    "size",
    ": ",
    "\n",
    "- ",
    "{",
    "}",
    "[",
    "]",
    "&a ",
    "*a",
    "!!int ",
    "!!binary ",
    "? ",
    "'",
    '"',
    "1",
    "1_0",
    "0x",
    "1:60",
    ".inf",
    "2020-13-99",
    "~",
    "<<",
    "=",
    "%YAML 9",
    "---",
    "...",
    "> ",
    "@",
    "\t",
    "\x00",
]


@given(st.one_of(st.text(max_size=200), st.lists(st.sampled_from(YAML_BITS), max_size=40).map("".join)))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(BadInput):
        parse_yaml(Outer, text, "fuzz")


@given(st.one_of(st.text(max_size=40), st.lists(st.sampled_from(YAML_BITS), max_size=10).map("".join)))
def test_any_override_is_read_or_refused(override: str) -> None:
    for text in (override, f"name={override}", f"inner.size={override}"):
        with contextlib.suppress(BadInput):
            parse_yaml(Outer, "name: a", "fuzz", [text])


@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_nesting_is_read_or_refused(depth: int) -> None:
    refused("[" * depth)
    refused("name: " + "[" * depth + "]" * depth)
    refused("name: a", "name=" + "[" * depth + "]" * depth)
