"""The rendered folder goes through a real kubectl, and its serve config through Ray's own schema."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kuberay_crds import EXAMPLES, crds

from k8s.render import render_files

KUBECTL = Path(sys.executable).parent / "kubectl"


def kustomize(folder: Path) -> list[dict[str, object]]:
    """What `kubectl kustomize` makes of a folder."""
    command = [str(KUBECTL), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def by_name(manifests: list[dict[str, object]]) -> list[dict[str, object]]:
    return sorted(manifests, key=lambda manifest: (str(manifest["kind"]), str(manifest["metadata"])))


@pytest.mark.parametrize(
    ("example", "where"),
    [
        ("recipe.yaml", None),
        ("recipe.yaml", EXAMPLES / "settings.yaml"),
        ("recipe.yaml", EXAMPLES / "nightly.yaml"),
        ("service.yaml", None),
        ("service.yaml", EXAMPLES / "settings.yaml"),
        ("service.yaml", EXAMPLES / "gateway.yaml"),
    ],
)
def test_kubectl_renders_what_was_rendered(example: str, where: Path | None, tmp_path: Path) -> None:
    render_files(EXAMPLES / example, out=tmp_path, settings=where, run=None)
    text = render_files(EXAMPLES / example, out=None, settings=where, run=None)
    assert isinstance(text, str)
    found = kustomize(tmp_path)
    assert by_name(found) == by_name(list(yaml.safe_load_all(text))), "kustomize changes nothing"
    assert crds().check(found).valid


def test_an_overlay_sets_the_image(tmp_path: Path) -> None:
    render_files(EXAMPLES / "service.yaml", out=tmp_path / "base", settings=None, run=None)
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    image = {"name": "tandem-ray", "newName": "registry.example.com/tandem", "newTag": "7"}
    (overlay / "kustomization.yaml").write_text(
        yaml.safe_dump({"resources": ["../base"], "images": [image], "namespace": "other"})
    )
    found = kustomize(overlay)
    assert {str(m["metadata"]["namespace"]) for m in found} == {"other"}  # type: ignore[index]
    text = yaml.safe_dump_all(found)
    assert "image: tandem-ray" not in text
    assert "image: registry.example.com/tandem:7" in text


def test_rays_own_schema_takes_the_serve_config() -> None:
    from ray.serve.schema import ServeDeploySchema

    text = render_files(EXAMPLES / "service.yaml", out=None, settings=None, run=None)
    assert isinstance(text, str)
    (service,) = [m for m in yaml.safe_load_all(text) if m["kind"] == "RayService"]
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert {application.import_path for application in schema.applications} == {"serving.app:build"}
    assert [application.route_prefix for application in schema.applications] == [
        "/v2/models/digits",
        "/v2/models/faces",
        "/",
    ]


def test_what_kuberay_would_import_builds() -> None:
    """Ray Serve imports the path and calls it with the arguments, as here."""
    from ray import serve
    from ray._common.utils import import_attr

    text = render_files(EXAMPLES / "service.yaml", out=None, settings=None, run=None)
    assert isinstance(text, str)
    (service,) = [m for m in yaml.safe_load_all(text) if m["kind"] == "RayService"]
    for application in yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]:
        built = import_attr(application["import_path"])(application["args"])
        assert isinstance(built, serve.Application)
