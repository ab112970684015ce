"""Runbooks name commands and options that exist, and whatever links to a runbook finds it."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from cluster.cli import app
from tests.prometheus import rules

REPOSITORY = Path(__file__).parents[2]
RUNBOOKS = REPOSITORY / "k8s" / "runbooks"
NAMES = sorted(path.name for path in RUNBOOKS.glob("*.md"))

_BLOCK = re.compile(r"^( *)```sh\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\]\(([^)]+)\)")


@functools.cache
def commands(name: str) -> list[list[str]]:
    """Every command line of a runbook, in words; what is run in a pod counts as well."""
    text = (RUNBOOKS / name).read_text()
    lines = [line.strip() for _, block in _BLOCK.findall(text) for line in block.splitlines()]
    lines += _INLINE.findall(_BLOCK.sub("", text))
    found = []
    for line in lines:
        words = shlex.split(line.partition(" | ")[0])
        found += [words, words[words.index("--") + 1 :]] if "--" in words else [words]
    return [words for words in found if words]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_of_tandem_exists_with_its_options_and_arguments(name: str) -> None:
    for words in commands(name):
        if words[0] == "tandem" and len(words) > 1:
            _check(words[1:], get_command(app), " ".join(words))


def _check(words: list[str], command: Any, line: str) -> None:
    while hasattr(command, "commands"):
        assert words, line
        assert words[0] in command.commands, line
        command, words = command.commands[words[0]], words[1:]
        if not words and not hasattr(command, "commands"):
            return  # named, not written out
    options = {
        one: param for param in command.params if param.param_type_name == "option" for one in param.opts
    }
    given, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("-"):
            assert word in options, (line, word)
            if not options[word].is_flag:
                assert rest, (line, "a value", word)
                rest.pop(0)
        else:
            given.append(word)
    arguments = [param for param in command.params if param.param_type_name == "argument"]
    needed = [param for param in arguments if param.required]
    assert len(needed) <= len(given), (line, "arguments")
    assert len(given) <= len(arguments) or any(param.nargs == -1 for param in arguments), line


def test_a_command_that_does_not_exist_is_seen() -> None:
    for wrong in ("models rollbak m", "models canary m", "models rollback m --reason x", "k8s plan a"):
        with pytest.raises(AssertionError):
            _check(wrong.split(), get_command(app), wrong)


@pytest.mark.parametrize("name", NAMES)
def test_every_verb_of_kubectl_exists(name: str) -> None:
    known = {"get", "apply", "describe", "logs", "delete", "drain", "cordon", "exec", "create"}
    for words in commands(name):
        if words[0] == "kubectl" and len(words) > 1:
            verb = words[3] if words[1] == "-n" else words[1]
            assert verb in known, words


@pytest.mark.parametrize("name", NAMES)
def test_links_resolve(name: str) -> None:
    links = _LINK.findall((RUNBOOKS / name).read_text())
    assert [link for link in links if not (RUNBOOKS / link).is_file()] == []


def test_all_runbooks_are_listed_and_name_commands() -> None:
    listed = set(_LINK.findall((RUNBOOKS / "README.md").read_text()))
    assert listed == set(NAMES) - {"README.md"}
    assert {"drain.md", "upgrade.md", "rollback.md", "token-rotation.md", "redis-loss.md"} <= listed
    for name in listed:
        assert sum(words[0] in ("kubectl", "tandem") for words in commands(name)) >= 3, name


def test_every_alert_links_to_a_runbook() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    for alert in alerts:
        path = REPOSITORY / alert["annotations"]["runbook_url"]
        assert path.is_file(), alert["alert"]
        assert path.parent == RUNBOOKS
