"""The kustomize tree beside this file, and what of it is written rather than edited.

`base/cpu` and `base/gpu` hold what `tandem k8s render` makes; all else is hand-written. Kustomize has no
patch for "every worker group with GPUs", so a component that wants one says it once in `groups.yaml`, and
here it is written out, as the component `groups` below it, for the worker groups that there are. Such a patch
names all groups in their order, those that it leaves alone too: kustomize moves what a patch names to the
front, and to the operator another order is another cluster.

Knows no kubectl: that is `k8s.overlay`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.config import load_yaml
from k8s.pods import Manifest
from k8s.render import HEADER, render
from k8s.settings import ClusterSettings
from k8s.yamltext import to_yaml

TREE = Path(__file__).parent
BASES = ("cpu", "gpu")
_KUSTOMIZATION = "kustomization.yaml"
_CLUSTERS = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
_EXAMPLES = {
    "cpu": {"training": "recipe-cpu.yaml", "serving": "service-cpu.yaml"},
    "gpu": {"training": "recipe.yaml", "serving": "service.yaml"},
}

Parts = Mapping[str, Sequence[Manifest]]
"""What a base holds, by the name of its folder: training, serving."""


def base_settings(tree: Path, part: str) -> ClusterSettings:
    """What the tree's own training or serving is rendered with.

    Raises:
        BadInput, NotFound: the file is missing or breaks a rule.
    """
    return load_yaml(ClusterSettings, tree / "base" / "settings" / f"{part}.yaml")


def write_examples(tree: Path) -> None:
    """Write every rendered part of the tree anew: bases of the examples, patches of groups, monitoring."""
    bases = {
        base: {
            part: render(tree / "examples" / file, base_settings(tree, part)) for part, file in files.items()
        }
        for base, files in _EXAMPLES.items()
    }
    write_bases(tree, bases)
    write_monitoring(tree)


def write_bases(tree: Path, bases: Mapping[str, Parts]) -> None:
    """Replace what the bases hold, and the patches of worker groups that belong to it.

    Args:
        tree: a copy of the tree, or the tree itself.
        bases: what each base is to hold, by its name.
    """
    for base, parts in bases.items():
        folder = tree / "base" / base
        shutil.rmtree(folder, ignore_errors=True)
        for part, manifests in parts.items():
            _write(folder / part / "manifests.yaml", *manifests)
            _write(folder / part / _KUSTOMIZATION, _kustomization(["manifests.yaml"]))
        _write(folder / _KUSTOMIZATION, _kustomization(["../common", *parts]))
    owners: dict[str, Manifest] = {}
    for one in (one for parts in bases.values() for manifests in parts.values() for one in manifests):
        if one["kind"] in _CLUSTERS:
            owners[f"{one['kind'].lower()}-{one['metadata']['name']}"] = one
    for source in sorted((tree / "components").glob("*/groups.yaml")):
        _write_groups(source, owners)


def write_monitoring(tree: Path) -> None:
    """Write the alerts as a PrometheusRule and the dashboards as ConfigMaps, for the component monitoring."""
    source, target = tree / "monitoring", tree / "components" / "monitoring"
    rules = yaml.safe_load((source / "alerts.yaml").read_text("utf-8"))
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "tandem"},
    }
    _write(target / "rules.yaml", rule | {"spec": rules})
    boards = [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": f"tandem-dashboard-{path.stem}", "labels": {"grafana_dashboard": "1"}},
            "data": {path.name: json.dumps(json.loads(path.read_text("utf-8")), separators=(",", ":"))},
        }
        for path in sorted((source / "dashboards").glob("*.json"))
    ]
    _write(target / "dashboards.yaml", *boards)


def group_patch(owner: Manifest, wanted: str, patch: Mapping[str, Any]) -> Manifest | None:
    """A patch of all worker groups of `owner` that are `wanted`; None where there is none.

    Args:
        owner: a RayJob or a RayService.
        wanted: `gpu`, `cpu` or `all`.
        patch: of one group; `{gpus}` in its texts becomes the GPUs of the group's pod.
    """
    field = _CLUSTERS[owner["kind"]]
    groups = owner["spec"][field].get("workerGroupSpecs", [])
    if not any(_is(wanted, group) for group in groups):
        return None
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "metadata": {"name": owner["metadata"]["name"]},
        "spec": {
            field: {
                "workerGroupSpecs": [
                    {"groupName": group["groupName"]}
                    | (_filled_in(patch, _gpus(group)) if _is(wanted, group) else {})
                    for group in groups
                ]
            }
        },
    }


def _write_groups(source: Path, owners: Mapping[str, Manifest]) -> None:
    folder = source.parent / "groups"
    shutil.rmtree(folder, ignore_errors=True)
    said = yaml.safe_load(source.read_text("utf-8"))
    patches = []
    for name, owner in owners.items():
        patch = group_patch(owner, said["groups"], said["patch"])
        if patch is None:
            continue
        _write(folder / f"{name}.yaml", patch)
        # By kind and name: a base without this object is patched no less well.
        target = {"kind": owner["kind"], "name": f"^{owner['metadata']['name']}$"}
        patches.append({"path": f"{name}.yaml", "target": target})
    _write(folder / _KUSTOMIZATION, _component(patches))


def _is(wanted: str, group: Manifest) -> bool:
    return wanted == "all" or (wanted == "gpu") == bool(_gpus(group))


def _gpus(group: Manifest) -> int:
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    return sum(int(value) for name, value in limits.items() if name.endswith("gpu"))


def _filled_in(patch: Any, gpus: int) -> Any:
    if isinstance(patch, dict):
        return {key: _filled_in(value, gpus) for key, value in patch.items()}
    if isinstance(patch, list):
        return [_filled_in(item, gpus) for item in patch]
    return patch.replace("{gpus}", str(gpus)) if isinstance(patch, str) else patch


def _kustomization(resources: Sequence[str]) -> Manifest:
    about = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    return about | {"resources": list(resources)}


def _component(patches: Sequence[Manifest]) -> Manifest:
    about = {"apiVersion": "kustomize.config.k8s.io/v1alpha1", "kind": "Component"}
    return about | {
        "patches": list(patches)
    }  # an empty list, too: kustomize refuses a file that says nothing


def _write(path: Path, *documents: Manifest) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEADER + to_yaml(*documents), "utf-8")


def written(tree: Path) -> Iterator[Path]:
    """Every file of the tree that is written here."""
    for path in sorted(tree.glob("base/*/**/*.yaml")) + sorted(tree.glob("components/**/*.yaml")):
        if path.read_text("utf-8").startswith(HEADER):
            yield path
