"""A promotion as a diff: the plan's verdict per object on top, no noise, no secret."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from kuberay_crds import EXAMPLES
from typer.testing import CliRunner

from cluster.cli import app
from k8s.diff import as_text, diff
from k8s.render import render
from k8s.settings import ClusterSettings
from k8s.yamltext import to_yaml

Tree = dict[str, Any]


def rendered(file: str = "service.yaml", **options: Any) -> list[Tree]:
    return render(EXAMPLES / file, ClusterSettings.model_validate(options))


def text(old: list[Tree], new: list[Tree]) -> str:
    return "\n".join(as_text(diff(old, new)))


def test_a_new_image() -> None:
    shown = text(rendered(image="tandem-ray:1"), rendered(image="tandem-ray:2"))
    verdict, beside, *_ = shown.splitlines()
    assert verdict.startswith("# RayService/vision: new cluster: spec.rayClusterConfig.headGroupSpec")
    assert beside.startswith("# beside what runs: ")
    assert "--- a/RayService/vision" in shown
    removed = [line for line in shown.splitlines() if line.startswith("-") and "image: tandem-ray:1" in line]
    assert len(removed) == 3, "the head and both groups"
    assert "NetworkPolicy" not in shown, "what is the same isn't shown"


def test_what_is_served_is_compared_as_what_it_says() -> None:
    old, new = rendered(), rendered()
    spec = new[-1]["spec"]
    spec["serveConfigV2"] = spec["serveConfigV2"].replace("slo_ms: 100.0", "slo_ms: 50.0")
    found = diff(old, new)
    (only,) = found.objects
    assert only.verdict == "in place: spec.serveConfigV2"
    changed = [line.strip("+- ") for line in only.patch if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert set(changed) == {"slo_ms: 100.0", "slo_ms: 50.0"}


@pytest.mark.parametrize(
    "noise",
    [
        lambda objects: objects.reverse(),
        lambda objects: objects[-1].update(status={"a": 1}),
        lambda objects: objects[-1]["metadata"].update(uid="1", resourceVersion="2", managedFields=[]),
        lambda objects: objects[-1]["metadata"]["annotations"].update(
            {"kubectl.kubernetes.io/last-applied-configuration": "{}"}
        ),
        lambda objects: objects[0]["metadata"].update(labels={}, annotations=None),
        lambda objects: objects[-1].update(spec=dict(reversed(objects[-1]["spec"].items()))),
        lambda objects: objects[-1]["spec"].update(suspend=None),
    ],
)
def test_noise(noise: Any) -> None:
    old, new = rendered(), rendered()
    noise(new)
    assert text(old, new) == "# nothing changes"


def test_the_order_of_a_list_is_no_noise() -> None:
    """The operator's hash sees it."""
    old, new = rendered(), rendered()
    new[-1]["spec"]["rayClusterConfig"]["workerGroupSpecs"].reverse()
    assert "new cluster" in text(old, new)


def test_a_recipe_that_changed_is_compared_with_the_one_before(tmp_path: Path) -> None:
    changed = tmp_path / "recipe.yaml"
    changed.write_text((EXAMPLES / "recipe.yaml").read_text().replace("epochs: 5", "epochs: 7"))
    schedule = ClusterSettings.model_validate({"schedule": {"cron": "@daily"}})
    shown = text(render(EXAMPLES / "recipe.yaml", schedule), render(changed, schedule))
    assert "-    epochs: 5" in shown or "-      epochs: 5" in shown, shown
    assert "/dev/null" not in shown
    assert "# CronJob/digits: in place" in shown


def secret(**data: str) -> Tree:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": data}


def test_secrets_stay_hidden() -> None:
    shown = text(
        [secret(kept="hunter1", turned="hunter2")], [secret(kept="hunter1", turned="hunter3", new="x9")]
    )
    assert "hunter" not in shown
    assert "x9" not in shown
    assert "+  turned: (hidden, and changed)" in shown
    assert "+  new: (hidden)" in shown
    assert "hunter" not in text([], [secret(a="hunter1")]) + text([secret(a="hunter1")], [])
    assert "hunter" not in json.dumps([one._asdict() for one in diff([], [secret(a="hunter1")]).objects])


def test_objects_that_come_and_go() -> None:
    old, new = rendered(), rendered()
    gone = copy.deepcopy(old[0])
    gone["metadata"]["name"] = "before"
    shown = text([*old, gone], new)
    assert "# ServiceAccount/before: left behind" in shown
    assert "+++ /dev/null" in shown


def test_the_command(tmp_path: Path) -> None:
    for name in ("1", "2"):
        (tmp_path / name).write_text(to_yaml(*rendered(image=f"tandem-ray:{name}")))
    arguments = ["k8s", "diff", str(tmp_path / "1"), str(tmp_path / "2")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert done.output.startswith("# RayService/vision: new cluster")
    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert found["objects"][0]["object"] == "RayService/vision"
