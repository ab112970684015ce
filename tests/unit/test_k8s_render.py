"""What is rendered is valid whatever the recipe or the service, and keeps the rules no CRD states."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kuberay_crds import EXAMPLES, crds

from cluster.config import load_yaml
from cluster.errors import BadInput
from k8s.capacity import Demand, worker_groups
from k8s.naming import run_name
from k8s.pods import container_security
from k8s.rayservice import ingress_env
from k8s.render import render, render_files, render_recipe, render_service
from k8s.settings import ClusterSettings
from k8s.yamltext import to_yaml
from serving.ingress import ingress_env as machine_env
from serving.layout import Application, applications
from serving.service import Service
from training.recipe import Recipe

SMALL = {
    "model": "digits",
    "task": "image-classification",
    "data": {"train": "s3://b/train", "eval": "gs://b/eval"},
    "store": "s3://b/store?endpoint=http://minio:9000",
}
SERVED = {"store": "az://b/store", "models": [{"model": "digits@live"}]}


def recipe(**changes: Any) -> Recipe:
    return Recipe.model_validate({**SMALL, **changes})


def service(**changes: Any) -> Service:
    return Service.model_validate({**SERVED, **changes})


def the(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found


def cluster_of(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    for manifest in manifests:
        spec = manifest.get("spec", {})
        found: dict[str, Any] | None = spec.get("rayClusterSpec") or spec.get("rayClusterConfig")
        if found:
            return found
    raise AssertionError("no cluster among the manifests")


def pods_of(manifests: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    cluster = cluster_of(manifests)
    pods = {"head": cluster["headGroupSpec"]["template"]}
    pods |= {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    for manifest in manifests:
        if manifest["kind"] == "RayJob":
            pods["submitter"] = manifest["spec"]["submitterPodTemplate"]
    return pods


def assert_sound(manifests: list[dict[str, Any]]) -> None:
    """The CRDs, and the rules that only the operator enforces."""
    again = list(yaml.safe_load_all(to_yaml(*manifests)))
    assert again == manifests, "what is rendered survives YAML"
    report = crds().check(manifests)
    assert report.valid, "\n".join(map(str, report.findings))
    cluster = cluster_of(manifests)
    assert cluster["authOptions"]["secretName"]
    assert cluster["rayVersion"]
    groups = cluster["workerGroupSpecs"]
    assert len({group["groupName"] for group in groups}) == len(groups)
    for group in groups:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        assert "resources" not in group
        assert group["rayStartParams"] == {}
    autoscales = any(group["minReplicas"] < group["maxReplicas"] for group in groups)
    assert cluster["enableInTreeAutoscaling"] is autoscales
    assert ("autoscalerOptions" in cluster) is autoscales
    for name, pod in pods_of(manifests).items():
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["restartPolicy"] == "Never"
        assert spec["automountServiceAccountToken"] is (name == "head" and autoscales)
        (container,) = spec["containers"]
        assert container["securityContext"] == container_security()
        assert container["resources"]["limits"] == container["resources"]["requests"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
        assert {"tandem/name", "tandem/component", "tandem/role"} <= pod["metadata"]["labels"].keys()


names = st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,60}[a-z0-9])?", fullmatch=True).filter(lambda n: ".." not in n)
dns_names = st.from_regex(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?", fullmatch=True)
shares = st.one_of(st.integers(1, 64).map(float), st.floats(0.01, 1))
uris = st.sampled_from(["s3://b", "s3://b/p?endpoint=http://h:1&region=r", "gs://b/p", "az://b/ü"])


@st.composite
def bounds(draw: st.DrawFn, least: int = 1) -> dict[str, int]:
    low = draw(st.integers(least, 500))
    return {"min": low, "max": draw(st.integers(max(low, 1), 600))}


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    workers = draw(bounds()) | {"cpus": draw(shares), "gpus": draw(st.one_of(st.just(0.0), shares))}
    gate = draw(st.none() | st.fixed_dictionaries({"at_least": st.floats(0, 1)}))
    return recipe(
        model=draw(names),
        store=draw(uris),
        data={"train": draw(uris), "eval": draw(uris), "label": draw(st.text(max_size=20))},
        options=draw(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=9) | st.none())),
        workers=workers,
        optimization={"global_batch_size": draw(st.integers(workers["max"], 10_000))},
        checkpoint={"every_s": None, "every_steps": 7},
        run=draw(st.none() | dns_names),
        gate=gate,
    )


@st.composite
def services(draw: st.DrawFn) -> Service:
    models = draw(st.lists(names, min_size=1, max_size=5, unique=True))
    served = []
    for name in models:
        gpus = draw(st.one_of(st.just(0.0), shares))
        cpus = draw(st.one_of(shares, st.just(0.0))) if gpus else draw(shares)
        served.append({"model": name, "replicas": draw(bounds(least=0)) | {"cpus": cpus, "gpus": gpus}})
        if draw(st.booleans()):
            served[-1]["other_replicas"] = draw(bounds(least=0)) | {"cpus": draw(shares), "gpus": 1.0}
    drain_s = draw(st.floats(1, 3600) | st.just(0))
    return service(name=draw(dns_names), store=draw(uris), models=served, drain_s=drain_s)


cluster_settings = st.builds(
    lambda **fields: ClusterSettings.model_validate(fields),
    namespace=st.just("ns"),
    store_secret=st.none() | st.just("store"),
    redis=st.none() | st.just({"address": "redis:6379", "password": {"name": "redis", "key": "password"}}),
    priority_class=st.none() | st.just("high"),
    tolerations=st.lists(st.fixed_dictionaries({"key": st.just("spot")}), max_size=1),
    node_selector=st.dictionaries(st.just("pool"), st.just("ml")),
    gpu=st.sampled_from([{}, {"product": "NVIDIA-L4"}, {"resource": "amd.com/gpu"}]),
    job=st.fixed_dictionaries(
        {"retries": st.integers(0, 9), "deadline_s": st.none() | st.integers(1, 10**6)},
        optional={"cleanup": st.just({"succeeded": {"record_s": 60}}), "gang": st.just({"queue": "ml"})},
    ),
    serving=st.sampled_from(
        [{}, {"gateway": {"class": "istio"}}, {"upgrade": "none"}, {"unready_s": 600, "old_cluster_s": 0}]
    ),
    gpu_idle_timeout_s=st.none() | st.integers(1, 900),
    monitoring_namespace=st.none() | st.just("monitoring"),
    image_pull_secrets=st.lists(st.just("pull"), max_size=1),
)

# Without the explaining of failures, which traces every line and takes minutes here.
phases = [Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink]
slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
many = settings(max_examples=60, deadline=None, phases=phases, suppress_health_check=slow)


@many
@given(recipes(), cluster_settings)
def test_any_recipe_renders_to_a_valid_job(made: Recipe, where: ClusterSettings) -> None:
    manifests = render_recipe(made, where)
    assert_sound(manifests)
    config, job = the(manifests, "ConfigMap"), the(manifests, "RayJob")
    assert Recipe.model_validate(yaml.safe_load(config["data"]["recipe.yaml"])) == made
    assert len(job["metadata"]["name"]) <= 47
    assert len(config["metadata"]["name"]) <= 63
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    fit = math.floor(1 / (made.workers.gpus or made.workers.cpus) + 1e-9) or 1
    assert group["minReplicas"] * fit >= made.workers.min
    assert group["maxReplicas"] * fit >= made.workers.max


@many
@given(services(), cluster_settings)
def test_any_service_renders_to_a_valid_service(made: Service, where: ClusterSettings) -> None:
    manifests = render_service(made, where)
    assert_sound(manifests)
    spec = the(manifests, "RayService")["spec"]
    found = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert [Application(**application) for application in found] == applications(made)
    assert all(Service.model_validate(a["args"]["service"]) == made for a in found)
    always = sum(group["minReplicas"] for group in spec["rayClusterConfig"]["workerGroupSpecs"])
    assert spec["excludeHeadPodFromServeSvc"] is (always > 0)
    for name, pod in pods_of(manifests).items():
        if name != "head" and made.drain_s:
            sleep_s = pod["spec"]["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
            assert made.drain_s <= sleep_s < pod["spec"]["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("example", ["recipe.yaml", "service.yaml"])
@pytest.mark.parametrize("where", [None, EXAMPLES / "settings.yaml"])
def test_examples_render(example: str, where: Path | None) -> None:
    found = load_yaml(ClusterSettings, where) if where else ClusterSettings()
    assert_sound(render(EXAMPLES / example, found))


def test_a_job_resumes_its_run_in_every_attempt() -> None:
    job = the(render_recipe(recipe(), ClusterSettings()), "RayJob")
    name = job["metadata"]["name"]
    assert job["spec"]["entrypoint"] == f"tandem train /recipe/recipe.yaml --json --run {name} --as-job"
    assert job["spec"]["backoffLimit"] > 0
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert "jobId" not in job["spec"], "a fixed id would make the retry find the failed attempt"


def test_run_names_depend_on_the_recipe_alone() -> None:
    assert run_name(recipe()) == run_name(recipe())
    assert run_name(recipe()) != run_name(recipe(workers={"max": 2}))
    assert run_name(recipe(), "mine") == run_name(recipe(run="mine")) == "mine"
    assert run_name(recipe(model="7.b_x")).startswith("m-7-b-x-")
    assert len(run_name(recipe(model="a" * 63))) == 47


@pytest.mark.parametrize("bad", ["x" * 48, "2026-run", "a.b", "a_b", "ends-"])
def test_a_chosen_name_that_the_operator_refuses_is_refused_first(bad: str) -> None:
    for attempt in (
        lambda: render_recipe(recipe(), ClusterSettings(), bad),
        lambda: render_recipe(recipe(run=bad), ClusterSettings()),
        lambda: render_service(service(name=bad), ClusterSettings()),
    ):
        with pytest.raises(BadInput) as caught:
            attempt()
        assert set(caught.value.parts()) == {"failed", "got", "allowed", "fix"}


@pytest.mark.parametrize("uri", ["file:///data", "data", "/data"])
def test_the_local_disk_is_refused(uri: str) -> None:
    for attempt in (
        lambda: render_recipe(recipe(store=uri), ClusterSettings()),
        lambda: render_recipe(recipe(data={"train": uri, "eval": "s3://b"}), ClusterSettings()),
        lambda: render_service(service(store=uri), ClusterSettings()),
    ):
        with pytest.raises(BadInput) as caught:
            attempt()
        assert set(caught.value.parts()) == {"failed", "got", "allowed", "fix"}


def test_gpus_are_asked_for_and_tolerated() -> None:
    made = render_recipe(
        recipe(workers={"min": 1, "max": 4, "cpus": 8, "gpus": 2}),
        ClusterSettings.model_validate({"gpu": {"product": "NVIDIA-L4"}}),
    )
    (group,) = cluster_of(made)["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (1, 4)
    pod = group["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L4"}
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    assert "tolerations" not in pods_of(made)["head"]["spec"]


def test_what_shares_a_gpu_shares_a_pod() -> None:
    assert worker_groups([Demand(1, 0.25, 3, 9)], "w") == [(4, 1, 1, 3)]
    assert worker_groups([Demand(0.5, 0, 1, 4)], "w") == [(1, 0, 1, 2)]
    assert worker_groups([Demand(1.5, 0, 1, 4)], "w") == [(2, 0, 1, 4)]
    assert worker_groups([Demand(0, 1, 0, 4)], "w") == [(1, 1, 0, 4)]


def test_models_of_one_size_share_a_group() -> None:
    two = [Demand(1, 0, 1, 2), Demand(1, 0, 0, 3), Demand(2, 1, 1, 1)]
    assert worker_groups(two, "w") == [(1, 0, 1, 5), (2, 1, 1, 1)]


def test_each_kind_of_replica_has_pods_of_its_own() -> None:
    model = {
        "model": "digits@live",
        "replicas": {"min": 1, "max": 8, "cpus": 1},
        "other_replicas": {"min": 0, "max": 2, "cpus": 4, "gpus": 1},
    }
    made = service(models=[model])
    manifests = render_service(made, ClusterSettings())
    assert_sound(manifests)
    groups = the(manifests, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert [(g["groupName"], g["minReplicas"], g["maxReplicas"]) for g in groups] == [
        ("cpu1", 1, 8),
        ("cpu4-gpu1", 0, 2),
    ]
    assert ["tolerations" in g["template"]["spec"] for g in groups] == [False, True]
    for pod in pods_of(manifests).values():
        env = {e["name"]: e["value"] for e in pod["spec"]["containers"][0]["env"]}
        assert env["RAY_SERVE_HAPROXY_BINARY_PATH"] == "/usr/local/bin/tandem-haproxy"
        assert int(env["TANDEM_WEIGHT_PORTS"]) > 1000
    with pytest.raises(BadInput, match="HAProxy"):
        render_service(made, ClusterSettings.model_validate({"serving": {"haproxy": False}}))


@pytest.mark.parametrize(("cpus", "gpus"), [(1, 1.5), (0, 0), (1, 0.001), (0.001, 0)])
def test_what_no_pod_can_hold_is_refused(cpus: float, gpus: float) -> None:
    with pytest.raises(BadInput):
        worker_groups([Demand(cpus, gpus, 1, 1)], "workers")


def test_secrets_are_named_and_never_shown() -> None:
    where = load_yaml(ClusterSettings, EXAMPLES / "settings.yaml").model_copy(update={"store_secret": "keys"})
    manifests = render_service(service(), where)
    assert "Secret" not in {manifest["kind"] for manifest in manifests}
    cluster = cluster_of(manifests)
    reference = {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "password"}}}
    assert cluster["gcsFaultToleranceOptions"]["redisPassword"] == reference
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert head["envFrom"] == [{"secretRef": {"name": "keys"}}]


@pytest.mark.parametrize(
    "wrong",
    [
        {"env": {"AWS_SECRET_ACCESS_KEY": "hunter2"}},
        {"env": {"RAY_AUTH_TOKEN": "hunter2"}},
        {"env": {"DB_PASSWORD": "hunter2"}},
        {"env": {"RAY_REDIS_ADDRESS": "r:1"}},
        {"redis": {"address": "user:hunter2@redis:6379"}},
        {"tolerations": [{"key": "spot", "value": "yes"}]},
        {"tolerations": [{"key": "spot", "operator": "Equal"}]},
        {"job": {"keep_cluster_s": 2**31}},
        {"image": "tandem"},
        {"image": "tandem:latest"},
        {"image": "registry:5000/tandem"},
        {"ray_version": "2.40.0"},
        {"namespace": "Not_A_Namespace"},
        {"unknown": 1},
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        ClusterSettings.model_validate(wrong)


def test_an_error_about_a_secret_doesnt_show_it(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("env:\n  AWS_SECRET_ACCESS_KEY: hunter2\n")
    with pytest.raises(BadInput, match="AWS_SECRET_ACCESS_KEY") as caught:
        load_yaml(ClusterSettings, path)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("image", ["tandem:1", "r.io:5000/a/b:1.2-x", "r.io/t@sha256:" + "0" * 64])
def test_fixed_images_are_taken(image: str) -> None:
    assert ClusterSettings(image=image).image == image


def test_pods_have_the_ingress_of_a_laptop() -> None:
    """All of it but what keeps services on one machine apart."""
    of_a_machine = re.compile("_PORT$|_LOC$|_PATH$|_BASE$|_FILE$|_NBTHREAD$|_DRAINING_PERIOD_S$|^TANDEM_")
    kept = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"}
    laptop = machine_env(drain_s=1)
    expected = {name: laptop[name] for name in laptop if name in kept or not of_a_machine.search(name)}
    pod = ingress_env(20)
    assert float(pod.pop("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S")) < 20
    assert pod == expected


def test_only_requests_reach_a_service_from_outside() -> None:
    policy = the(render_service(service(), ClusterSettings()), "NetworkPolicy")
    open_to_all = [rule for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert open_to_all == [{"ports": [{"protocol": "TCP", "port": 8000}]}]
    policy = the(render_recipe(recipe(), ClusterSettings()), "NetworkPolicy")
    assert all("from" in rule for rule in policy["spec"]["ingress"])


def test_a_budget_never_blocks_a_drain() -> None:
    kinds = {m["kind"] for m in render_service(service(), ClusterSettings())}
    assert "PodDisruptionBudget" not in kinds, "one replica can't be kept and moved"
    several = service(models=[{"model": "digits", "replicas": {"min": 3, "max": 3}}])
    budget = the(render_service(several, ClusterSettings()), "PodDisruptionBudget")
    assert budget["spec"]["minAvailable"] == 2


def test_files_are_written_again_but_not_over_a_strangers(tmp_path: Path) -> None:
    example = EXAMPLES / "recipe.yaml"
    first = render_files(example, out=tmp_path / "out", settings=None, run="mine")
    before = {path.name: path.read_bytes() for path in map(Path, first)}
    assert set(before) == {
        "serviceaccount.yaml",
        "configmap.yaml",
        "networkpolicy.yaml",
        "rayjob.yaml",
        "kustomization.yaml",
    }
    again = render_files(example, out=tmp_path / "out", settings=None, run="mine")
    assert {path.name: path.read_bytes() for path in map(Path, again)} == before
    (tmp_path / "out" / "kustomization.yaml").write_text("resources: []\n")
    with pytest.raises(BadInput, match="stays as it is"):
        render_files(example, out=tmp_path / "out", settings=None, run="mine")


def test_without_a_folder_it_is_one_text() -> None:
    text = render_files(EXAMPLES / "service.yaml", out=None, settings=EXAMPLES / "settings.yaml", run=None)
    assert isinstance(text, str)
    assert [m["kind"] for m in yaml.safe_load_all(text)][-1] == "RayService"
    assert "# Needs Secret tandem-ray-auth" in text


@pytest.mark.parametrize("text", ["", "store: s3://b\n", "models: []\nmodel: x\n", "[1]", "a: [", "\x00"])
def test_a_file_of_neither_kind_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(BadInput):
        render_files(path, out=None, settings=None, run=None)


@pytest.mark.parametrize(
    "text", ["\x85", "a\nb", " \nb ", "a\n", "no", "1e3", "\u2028", "\x00", "ü\t", "- a: b"]
)
def test_any_text_survives_yaml(text: str) -> None:
    data = {"key": text, text: ["nested", {text: text}]}
    assert yaml.safe_load(to_yaml(data)) == data


def test_a_service_has_no_run() -> None:
    with pytest.raises(BadInput, match="no run"):
        render_files(EXAMPLES / "service.yaml", out=None, settings=None, run="x")
