"""The image's Dockerfile, parsed: pinned, of the packages that were tested, for the user that pods run as."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from dockerfile_parse import DockerfileParser
from kuberay_crds import REPOSITORY

from k8s.settings import ClusterSettings

FILE = REPOSITORY / "k8s" / "image" / "Dockerfile"
TARGETS = ("cpu", "cuda")


class Step(NamedTuple):
    """One instruction."""

    name: str
    value: str


def steps() -> list[Step]:
    parsed = DockerfileParser(path=str(FILE), cache_content=True)
    return [
        Step(one["instruction"], one["value"]) for one in parsed.structure if one["instruction"] != "COMMENT"
    ]


def stages() -> dict[str, tuple[str, list[Step]]]:
    """By name: what each stage builds on, and its instructions."""
    found: dict[str, tuple[str, list[Step]]] = {}
    current: list[Step] = []
    for step in steps():
        if step.name == "FROM":
            base, _, name = step.value.partition(" AS ")
            current = []
            found[name] = (base, current)
        else:
            current.append(step)
    return found


def lineage(target: str) -> Iterator[Step]:
    """A stage's instructions, those that it builds on first."""
    base, own = stages()[target]
    if base in stages():
        yield from lineage(base)
    yield from own


def constraints() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def pip_installs() -> list[list[str]]:
    runs = [step.value for step in steps() if step.name == "RUN"]
    found = [shlex.split(part) for run in runs for part in re.split(r"&&", run.replace("\\\n", " "))]
    return [words for words in found if words[:2] == ["pip", "install"]]


def test_the_base_comes_by_digest_alone() -> None:
    first = steps()[0]
    assert first == Step("ARG", "BASE"), "no default: a tag would be one"
    assert {base for base, _ in stages().values()} - set(stages()) == {"${BASE}"}
    assert any("@sha256:[0-9a-f]{64}" in step.value for step in stages()["build"][1] if step.name == "RUN")


def test_whatever_is_installed_is_what_was_tested() -> None:
    installs = pip_installs()
    assert len(installs) == 3
    for words in installs:
        assert words[words.index("--constraint") + 1] == "constraints.txt", words


def test_the_constraints_hold_all_that_the_project_needs() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[\[=<>~ ]", line)[0].lower().replace("_", "-") for line in project["dependencies"]}
    pinned = {name.lower().replace("_", "-") for name in constraints()}
    assert needed <= pinned, needed - pinned
    minor = re.search(r">=(\d+\.\d+),", project["requires-python"])
    assert minor is not None
    assert f"python:{minor[1]}-" in FILE.read_text(), "the base that is named has the project's Python"


def test_the_image_has_the_ray_that_the_manifests_name() -> None:
    assert constraints()["ray"] == ClusterSettings().ray_version
    version = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["version"]
    assert ClusterSettings().image == f"tandem-ray:{version}"


def test_all_packages_are_copied_and_nothing_that_is_left_out() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    roots = {name.partition(".")[0] for name in settings["packages"]}
    copied = {step.value.split()[0] for step in stages()["build"][1] if step.name == "COPY"}
    assert roots <= copied
    ignore = (FILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    sources = {
        word for step in stages()["build"][1] if step.name == "COPY" for word in step.value.split()[:-1]
    }
    assert sources == allowed
    assert all((REPOSITORY / name).exists() for name in sources)


def test_all_packages_that_exist_are_installed() -> None:
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    roots = {name.partition(".")[0] for name in settings["packages"]}
    found = {
        str(init.parent.relative_to(REPOSITORY)).replace("/", ".")
        for root in roots
        for init in (REPOSITORY / root).rglob("__init__.py")
    }
    assert set(settings["packages"]) == found


@pytest.mark.parametrize("target", TARGETS)
def test_nobody_is_root(target: str) -> None:
    where = ClusterSettings()
    users = [step.value for step in lineage(target) if step.name == "USER"]
    assert users[-1] == f"{where.user_id}:{where.group_id}"
    assert list(lineage(target))[-1].name == "USER", "nothing runs or is copied after"


@pytest.mark.parametrize("target", TARGETS)
def test_the_root_file_system_may_be_read_only(target: str) -> None:
    """What is written goes to /tmp, which pods mount; nothing declares a volume elsewhere."""
    env = dict(
        pair.split("=", 1)
        for step in lineage(target)
        if step.name == "ENV"
        for pair in shlex.split(step.value)
    )
    assert env["HOME"] == "/tmp"
    assert [step.value for step in lineage(target) if step.name == "WORKDIR"][-1] == "/tmp"
    assert not any(step.name == "VOLUME" for step in lineage(target))


@pytest.mark.parametrize("target", TARGETS)
def test_what_builds_stays_behind(target: str) -> None:
    assert not any("pip install" in step.value for step in lineage(target))
    (copied,) = [step.value for step in lineage(target) if step.name == "COPY"]
    assert copied == f"--from=build-{target} /usr/local /usr/local"


def test_no_secret_and_no_address_of_a_key() -> None:
    text = FILE.read_text()
    assert not re.search(r"(?i)token|password|secret|access_key", text)
    assert "ADD" not in {step.name for step in steps()}


def test_without_a_target_it_is_the_one_that_runs_everywhere() -> None:
    assert list(stages())[-1] == "cpu"
