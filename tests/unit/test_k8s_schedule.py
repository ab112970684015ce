"""Scheduled retraining: what is rendered, what becomes of runs before it, the launcher over real HTTP."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from kuberay_crds import EXAMPLES, crds

from cluster.config import load_yaml
from cluster.errors import BadInput, TandemError
from k8s.launch import SCHEDULE_LABEL, Api, Concurrency, decide, launch
from k8s.lint.layers import lint
from k8s.naming import schedule_name
from k8s.pods import container_security
from k8s.render import render
from k8s.settings import ClusterSettings
from training.recipe import Recipe

Tree = dict[str, Any]

NIGHTLY = {"schedule": {"cron": "0 3 * * *", "time_zone": "Europe/Berlin"}}
BY_KUBERAY = {
    "schedule": {"cron": "@daily", "by": "RayCronJob", "concurrency": "Allow"},
    "job": {"cleanup": {"succeeded": {"record_s": 600}, "failed": {"record_s": 86_400}}},
}


def rendered(options: Tree, run: str | None = None) -> list[Tree]:
    made = render(EXAMPLES / "recipe.yaml", ClusterSettings.model_validate(options), run)
    assert lint(made, crds()).findings == ()
    return made


def the(made: list[Tree], kind: str, ending: str = "") -> Tree:
    (found,) = [one for one in made if one["kind"] == kind and one["metadata"]["name"].endswith(ending)]
    return found


def launched(made: list[Tree]) -> Tree:
    (data,) = [one["data"]["rayjob.json"] for one in made if "rayjob.json" in one.get("data", {})]
    found: Tree = json.loads(data)
    return found


def test_each_time_is_a_run_of_its_own() -> None:
    job = launched(rendered(NIGHTLY))
    assert job["spec"]["entrypoint"] == "tandem train /recipe/recipe.yaml --json --as-job"
    cron = the(rendered(BY_KUBERAY), "RayCronJob")
    assert cron["spec"]["jobTemplate"]["entrypoint"].endswith("--json --run-of-job")


def test_what_the_launcher_makes_passes_every_layer() -> None:
    job = launched(rendered(NIGHTLY))
    assert lint([job], crds()).findings == ()
    assert job["metadata"]["labels"][SCHEDULE_LABEL] == "digits"


def test_the_launcher_may_do_little_and_is_as_hardened_as_the_rest() -> None:
    made = rendered(NIGHTLY)
    assert the(made, "Role")["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "list", "delete"]}
    ]
    cron = the(made, "CronJob")["spec"]
    assert (cron["schedule"], cron["timeZone"]) == ("0 3 * * *", "Europe/Berlin")
    pod = cron["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == the(made, "ServiceAccount", "-schedule")["metadata"]["name"]
    assert pod["automountServiceAccountToken"] is True
    assert pod["containers"][0]["securityContext"] == container_security()


def test_names_leave_room_for_what_is_named_after_them() -> None:
    long = load_yaml(Recipe, EXAMPLES / "recipe.yaml").model_copy(update={"model": "1" * 63})
    assert schedule_name(long) == "m-" + "1" * 34
    assert the(rendered(NIGHTLY, "retrain"), "CronJob")["metadata"]["name"] == "retrain"
    with pytest.raises(BadInput, match="schedule's name"):
        rendered(NIGHTLY, "a" * 37)


def ray_job(name: str, state: str | None, made: int) -> Tree:
    status: Tree = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
    if state is not None:
        ended = "Failed" if state == "FAILED" else "Complete"
        status = {"jobDeploymentStatus": ended, "jobStatus": state}
    stamp = f"2026-01-{made:02}T00:00:00Z"
    labels = {SCHEDULE_LABEL: "nightly"}
    return {"metadata": {"name": name, "creationTimestamp": stamp, "labels": labels}, "status": status}


RUNNING = [ray_job("a", "SUCCEEDED", 1), ray_job("b", None, 2)]


@pytest.mark.parametrize(
    ("concurrency", "make", "delete"),
    [("Allow", True, ()), ("Forbid", False, ()), ("Replace", True, ("b",))],
)
def test_while_one_still_runs(concurrency: Concurrency, make: bool, delete: tuple[str, ...]) -> None:
    decision = decide(RUNNING, "c", concurrency, 3, 3)
    assert (decision.make, decision.delete) == (make, delete)


def test_only_so_many_are_kept_of_each_kind() -> None:
    """A stopped one, such as a gate's refusal, counts as failed; the youngest stay, whatever their order."""
    jobs = [
        ray_job("e", "SUCCEEDED", 5),
        ray_job("a", "SUCCEEDED", 1),
        ray_job("c", "STOPPED", 3),
        ray_job("b", "FAILED", 2),
        ray_job("d", "SUCCEEDED", 4),
    ]
    assert decide(jobs, "f", "Forbid", 2, 1).delete == ("a", "b")
    assert decide(jobs, "f", "Forbid", 0, 0).delete == ("a", "d", "e", "b", "c")
    assert decide(jobs, "f", "Forbid", 3, 3).delete == ()


def test_a_launcher_that_is_tried_again_makes_nothing_twice() -> None:
    decision = decide(RUNNING, "b", "Replace", 0, 0)
    assert (decision.make, decision.delete) == (False, ())


class Server(ThreadingHTTPServer):
    """As much of an API server as holds RayJobs of one namespace."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.jobs: dict[str, Tree] = {}
        self.refuses: int | None = None


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: object) -> None: ...

    def answer(self, status: int, body: Tree) -> None:
        data = json.dumps(body).encode()
        self.send_response(self.server.refuses or status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        selector = parse_qs(urlsplit(self.path).query)["labelSelector"][0]
        key, value = selector.split("=")
        jobs = self.server.jobs.values()
        self.answer(200, {"items": [job for job in jobs if job["metadata"]["labels"].get(key) == value]})

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = job["metadata"]["name"]
        exists = name in self.server.jobs
        self.server.jobs.setdefault(name, job)
        self.answer(409 if exists else 201, {})

    def do_DELETE(self) -> None:
        name = urlsplit(self.path).path.rpartition("/")[2]
        self.answer(200 if self.server.jobs.pop(name, None) else 404, {})


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def api(server: Server) -> Iterator[Api]:
    with httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}", trust_env=False) as client:
        yield Api(client, "ml")


def test_the_launcher_makes_what_is_due_and_clears_what_is_old(server: Server, api: Api) -> None:
    template = launched(rendered(NIGHTLY))
    old = ray_job("digits-1", "SUCCEEDED", 1)
    others = ray_job("others", None, 1)
    old["metadata"]["labels"] = template["metadata"]["labels"]
    server.jobs = {"digits-1": old, "others": others}
    assert launch(api, template, "digits-2", "Forbid", 0, 0) == "digits-2 begins"
    assert set(server.jobs) == {"digits-2", "others"}
    assert server.jobs["digits-2"]["spec"] == template["spec"]
    assert "namespace" not in server.jobs["digits-2"]["metadata"], "it is where the launcher is"
    assert launch(api, template, "digits-3", "Forbid", 0, 0).startswith("digits-3 is left out")
    launch(api, template, "digits-3", "Replace", 0, 0)
    assert set(server.jobs) == {"digits-3", "others"}


def test_what_the_api_server_refuses_is_told(server: Server, api: Api) -> None:
    server.refuses = 403
    with pytest.raises(TandemError, match="403"):
        launch(api, launched(rendered(NIGHTLY)), "digits-2", "Forbid", 0, 0)


def test_outside_a_pod_there_is_nobody_to_ask() -> None:
    with pytest.raises(BadInput, match="isn't a pod"):
        Api.in_a_pod({})


def test_lint_looks_into_what_the_launcher_will_make() -> None:
    made = rendered(NIGHTLY)
    config = next(one for one in made if "rayjob.json" in one.get("data", {}))
    job = launched(made)
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["hostNetwork"] = True
    config["data"]["rayjob.json"] = json.dumps(job)
    assert any("hostNetwork" in str(one) for one in lint(made, None).findings)


def test_a_gate_that_must_be_on_is_told() -> None:
    assert any("the gate RayCronJob" in one for one in lint(rendered(BY_KUBERAY), None).unchecked)
    assert not any("gate" in one for one in lint(rendered(NIGHTLY), crds()).unchecked)
