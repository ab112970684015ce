"""Every option of the settings: what it renders to, that it passes all layers, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from kuberay_crds import EXAMPLES, crds

from cluster.config import load_yaml
from cluster.errors import BadInput
from k8s.cron import checked_cron
from k8s.lint.layers import lint
from k8s.plan import plan
from k8s.render import render, render_recipe, render_service
from k8s.settings import ClusterSettings
from serving.service import Service
from training.recipe import Recipe

Tree = dict[str, Any]

FIXED = {"workers": {"min": 2, "max": 2, "cpus": 4, "gpus": 1}}
STEADY = {"models": [{"model": "digits@live", "replicas": {"min": 2, "max": 2}}]}


def recipe(**changes: Any) -> Recipe:
    given = load_yaml(Recipe, EXAMPLES / "recipe.yaml").model_dump(exclude_defaults=True)
    return Recipe.model_validate({**given, **changes})


def service(**changes: Any) -> Service:
    given = load_yaml(Service, EXAMPLES / "service.yaml").model_dump(exclude_defaults=True)
    return Service.model_validate({**given, **changes})


def job(options: Tree, **changes: Any) -> Tree:
    """The RayJob that options make of the example's recipe, clean in every layer."""
    made = render_recipe(recipe(**changes), ClusterSettings.model_validate(options))
    assert lint(made, crds()).findings == ()
    return made[-1]


def served(options: Tree, **changes: Any) -> Tree:
    """The RayService likewise."""
    made = render_service(service(**changes), ClusterSettings.model_validate(options))
    assert lint(made, crds()).findings == ()
    return made[-1]


def refused(options: Tree) -> str:
    with pytest.raises(ValueError, match="validation error") as caught:
        ClusterSettings.model_validate(options)
    return str(caught.value)


def test_a_finished_job_gives_its_nodes_back_at_once() -> None:
    """`ttlSecondsAfterFinished` is how long the cluster stays, not the record of the job."""
    assert job({})["spec"]["ttlSecondsAfterFinished"] == 0
    assert job({"job": {"keep_cluster_s": 60}})["spec"]["ttlSecondsAfterFinished"] == 60


def test_what_no_attempt_can_better_is_not_tried_again() -> None:
    assert job({})["spec"]["entrypoint"].endswith(" --as-job")
    staged = job({"job": {"cleanup": {}}})["spec"]["entrypoint"]
    assert "--as-job" not in staged, "no deletion rule knows a stopped job: its cluster would stay for ever"


def test_clean_up_in_stages() -> None:
    stages = {
        "succeeded": {"cluster_s": 0, "record_s": 600},
        "failed": {"workers_s": 0, "cluster_s": 60, "record_s": 3600},
    }
    spec = job({"job": {"cleanup": stages}}, **FIXED)["spec"]
    assert spec["shutdownAfterJobFinishes"] is False
    assert "ttlSecondsAfterFinished" not in spec
    rules = spec["deletionStrategy"]["deletionRules"]
    assert [(rule["policy"], *rule["condition"].values()) for rule in rules] == [
        ("DeleteCluster", "SUCCEEDED", 0),
        ("DeleteSelf", "SUCCEEDED", 600),
        ("DeleteWorkers", "Failed", 0),
        ("DeleteCluster", "Failed", 60),
        ("DeleteSelf", "Failed", 3600),
    ]


def test_workers_that_the_autoscaler_would_start_again() -> None:
    where = ClusterSettings.model_validate({"job": {"cleanup": {"failed": {"workers_s": 0, "cluster_s": 9}}}})
    with pytest.raises(BadInput, match=r"failed\.workers_s"):
        render_recipe(recipe(), where)


def test_a_job_that_waits_in_kueue() -> None:
    made = job({"job": {"kueue": {"queue": "ml", "priority_class": "low"}}}, **FIXED)
    labels = made["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "ml"
    assert labels["kueue.x-k8s.io/priority-class"] == "low"
    assert made["spec"]["shutdownAfterJobFinishes"] is True, "what is suspended must be able to go"
    assert "suspend" not in made["spec"], "written, it would stop the running job at each apply"


def test_kueue_admits_no_job_whose_size_changes() -> None:
    with pytest.raises(BadInput, match="whose size changes"):
        render_recipe(recipe(), ClusterSettings.model_validate({"job": {"kueue": {"queue": "ml"}}}))


@pytest.mark.parametrize(
    ("scheduler", "label"),
    [
        ("volcano", "volcano.sh/queue-name"),
        ("yunikorn", "yunikorn.apache.org/queue"),
        ("kai-scheduler", "kai.scheduler/queue"),
    ],
)
def test_a_gang(scheduler: str, label: str) -> None:
    gang = {"queue": "ml", "scheduler": scheduler, "priority_class": "low"}
    labels = job({"job": {"gang": gang}})["metadata"]["labels"]
    assert labels[label] == "ml"
    assert labels["ray.io/gang-scheduling-enabled"] == "true"
    assert labels["ray.io/priority-class-name"] == "low"


def test_deadlines() -> None:
    spec = job({"job": {"deadline_s": 86_400, "start_deadline_s": 600, "retries": 7}})["spec"]
    assert (spec["activeDeadlineSeconds"], spec["preRunningDeadlineSeconds"]) == (86_400, 600)
    assert spec["backoffLimit"] == 7


def test_groups_with_gpus_may_have_an_idle_time_of_their_own() -> None:
    config = served({"gpu_idle_timeout_s": 900})["spec"]["rayClusterConfig"]
    idle = {group["groupName"]: group.get("idleTimeoutSeconds") for group in config["workerGroupSpecs"]}
    assert idle == {"cpu1": None, "cpu2-gpu1": 900}
    fixed = job({"gpu_idle_timeout_s": 900}, **FIXED)["spec"]["rayClusterSpec"]
    assert "idleTimeoutSeconds" not in fixed["workerGroupSpecs"][0], "there is no autoscaler to read it"


def test_upgrades_step_by_step() -> None:
    gateway = {"class": "istio", "step_percent": 5, "interval_s": 20, "surge_percent": 40}
    strategy = served({"serving": {"gateway": gateway}})["spec"]["upgradeStrategy"]
    assert strategy == {
        "type": "NewClusterWithIncrementalUpgrade",
        "clusterUpgradeOptions": {
            "gatewayClassName": "istio",
            "stepSizePercent": 5,
            "intervalSeconds": 20,
            "maxSurgePercent": 40,
        },
    }


def test_without_an_autoscaler_there_are_no_steps() -> None:
    gateway = {"gateway": {"class": "istio"}}
    assert served({"serving": gateway}, **STEADY)["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    where = ClusterSettings.model_validate({"serving": {**gateway, "upgrade": "incremental"}})
    with pytest.raises(BadInput, match="nothing scales"):
        render_service(service(**STEADY), where)


def test_other_upgrades() -> None:
    assert served({})["spec"]["upgradeStrategy"] == {"type": "NewCluster"}
    assert served({"serving": {"upgrade": "none"}})["spec"]["upgradeStrategy"] == {"type": "None"}
    made = served({"serving": {"old_cluster_s": 5, "unready_s": 600}})
    assert made["spec"]["rayClusterDeletionDelaySeconds"] == 5
    assert made["metadata"]["annotations"]["ray.io/initializing-timeout"] == "600s"


def test_serves_own_proxy_instead_of_haproxy() -> None:
    def env(options: Tree) -> dict[str, str]:
        group = served(options)["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
        found = group["template"]["spec"]["containers"][0]["env"]
        return {one["name"]: one["value"] for one in found}

    assert env({})["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    plain = env({"serving": {"haproxy": False}})
    assert plain["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert not any(name.startswith("RAY_SERVE_HAPROXY") for name in plain)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"job": {"keep_cluster_s": 1, "cleanup": {}}}, "not both"),
        ({"job": {"kueue": {"queue": "q"}, "cleanup": {}}}, "no cleanup with kueue"),
        ({"job": {"kueue": {"queue": "q"}, "gang": {}}}, "not both"),
        ({"job": {"gang": {"scheduler": "kai-scheduler"}}}, "a queue with"),
        ({"job": {"gang": {"scheduler": "scheduler-plugins", "queue": "q"}}}, "no queue with"),
        ({"job": {"cleanup": {"failed": {"cluster_s": 9, "record_s": 3}}}}, "at most record_s"),
        ({"job": {"cleanup": {"failed": {"cluster_s": None}}}}, "GPUs are kept"),
        ({"serving": {"gateway": {"class": "i", "step_percent": 60}}}, "at most surge_percent"),
        ({"serving": {"upgrade": "incremental"}}, "a gateway with"),
        ({"serving": {"grpc_port": 8265}}, "Ray leaves free"),
        ({"serving": {"upgrade": "none", "gateway": {"class": "i"}}}, "no gateway with"),
        ({"schedule": {"cron": "60 * * * *"}}, "as the minute"),
        ({"schedule": {"cron": "@daily", "time_zone": "Mars/Base"}}, "Europe/Berlin"),
        ({"schedule": {"cron": "@daily", "by": "RayCronJob"}}, "concurrency: Allow"),
        ({"schedule": {"cron": "@daily", "by": "RayCronJob", "concurrency": "Allow"}}, "record_s in both"),
        (
            {
                "schedule": {"cron": "@daily", "by": "RayCronJob", "concurrency": "Allow"},
                "job": {"kueue": {"queue": "q"}},
            },
            "gives its jobs no labels",
        ),
    ],
)
def test_what_cannot_be_had_together(options: Tree, told: str) -> None:
    assert told in refused(options)


@pytest.mark.parametrize("text", ["0 3 * * *", "*/15 0-6,22 1 jan-mar MON", "@daily", "0 0 ? * 0-6/2"])
def test_cron_expressions(text: str) -> None:
    assert checked_cron(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "* * * *",
        "0 0 3 * * *",
        "60 * * * *",
        "* 24 * * *",
        "* * 0 * *",
        "* * * 13 *",
        "* * * * 7",
        "5-1 * * * *",
        "*/0 * * * *",
        "L * * * *",
        "TZ=UTC * * * * *",
        "@every 1h",
        "a-b * * * *",
        "*-5 * * * *",
    ],
)
def test_what_is_no_cron_expression(text: str) -> None:
    with pytest.raises(ValueError, match=r"as the|five fields"):
        checked_cron(text)


def test_grpc_beside_the_ingress_of_each_pod() -> None:
    where = ClusterSettings.model_validate({"serving": {"grpc_port": 9000}, "env": {"AWS_REGION": "x"}})
    made = render_service(service(), where)
    assert lint(made, crds()).findings == ()
    by_kind = {one["kind"]: one for one in made}
    door = by_kind["Service"]["spec"]
    assert door["ports"][0]["port"] == 9000
    assert door["selector"]["tandem/role"] == "worker"
    assert {"protocol": "TCP", "port": 9000} in by_kind["NetworkPolicy"]["spec"]["ingress"][-1]["ports"]
    cluster = made[-1]["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert len(pod["containers"]) == 1, "the operator takes the first for Ray's; the gateway is a sidecar"
        (gateway,) = pod["initContainers"]
        assert gateway["restartPolicy"] == "Always"
        assert gateway["command"][2] == "serving.grpc.beside"
    written = yaml.safe_load(by_kind["ConfigMap"]["data"]["service.yaml"])
    assert Service.model_validate(written) == service()


def test_another_model_is_no_new_cluster_for_grpc_either() -> None:
    where = ClusterSettings.model_validate({"serving": {"grpc_port": 9000}})
    changed = [{**service().models[0].model_dump(), "slo_ms": 50}, service().models[1].model_dump()]
    found = plan(render_service(service(), where), render_service(service(models=changed), where))
    assert found.effects == {"in place"}


def test_grpc_reaches_the_head_where_all_workers_may_be_gone() -> None:
    where = ClusterSettings.model_validate({"serving": {"grpc_port": 9000}})
    asleep = service(models=[{"model": "digits@live", "replicas": {"min": 0, "max": 2}}])
    (door,) = [one for one in render_service(asleep, where) if one["kind"] == "Service"]
    assert "tandem/role" not in door["spec"]["selector"]


@pytest.mark.parametrize(("file", "settings"), [("recipe", "nightly"), ("service", "gateway")])
def test_the_examples_pass_every_layer(file: str, settings: str) -> None:
    where = load_yaml(ClusterSettings, EXAMPLES / f"{settings}.yaml")
    assert lint(render(EXAMPLES / f"{file}.yaml", where), crds()).findings == ()
