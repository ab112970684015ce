"""Files that aren't the tree's own, through every overlay: no GPUs, GPUs alone, what kustomize refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.errors import BadInput
from k8s.lint.layers import lint
from k8s.overlay import render_overlay
from k8s.tree import TREE

OVERLAYS = ("dev-cpu", "staging", "prod-gpu", "prod-ha")
REPLICAS = "{min: 1, max: 2, cpus: 1, gpus: %d}"
SERVICE = "store: s3://bucket/tandem\nmodels:\n- {model: iris@live, replicas: " + REPLICAS + "}\n"


@pytest.mark.parametrize("gpus", [0, 1])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_file_of_either_sort_goes_through_every_overlay(tmp_path: Path, overlay: str, gpus: int) -> None:
    file = tmp_path / "on-s3.yaml"
    file.write_text(SERVICE % gpus)
    text = render_overlay(file, overlay, out=None, settings=None, run=None)
    found = [one for one in yaml.load_all(str(text), Loader=yaml.CSafeLoader) if one]
    assert "RayService" in {one["kind"] for one in found}
    assert lint(found, None).findings == ()


def test_what_kustomize_blames_is_told_to_its_end(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "kustomization.yaml").write_text("resources: [../../overlays/wrong]\n")
    with pytest.raises(BadInput) as caught:
        render_overlay(TREE / "examples" / "recipe.yaml", str(own), out=None, settings=None, run=None)
    assert "no such file" in caught.value.got
    assert "/tandem-k8s-" not in str(caught.value)
