"""Rendered manifests on a real Ray. Run by tests/integration/test_k8s_on_ray.py, in a network of its own."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray_pod import head, kill_driver, mounted
from seaweed import Seaweed
from servables import LABELS, publish_mlp

from cluster.events import read_events
from cluster.runs import Run
from cluster.storage import open_store
from k8s.rayjob import RECIPE_DIR
from k8s.render import render
from k8s.settings import ClusterSettings
from training.data.samples import write_digits

pytestmark = pytest.mark.timeout(240)
TOKEN = "a-token-of-the-test-and-of-nothing-else"


@pytest.fixture
def s3() -> Iterator[Seaweed]:
    with Seaweed() as server:
        yield server


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="p", dir="/tmp"))  # short: sockets lie below it
    yield path
    shutil.rmtree(path, ignore_errors=True)


def until(true: Callable[[], bool], within_s: float) -> float:
    """Ask again and again; the seconds it took. No answer at all counts as no."""
    began_s = time.monotonic()
    while True:
        try:
            if true():
                return time.monotonic() - began_s
        except httpx.TransportError:
            pass
        assert time.monotonic() - began_s < within_s, f"not within {within_s} s"
        time.sleep(0.2)


def of_kind(manifests: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(manifest for manifest in manifests if manifest["kind"] == kind)


def rendered(path: Path, content: dict[str, Any], kind: str) -> dict[str, Any]:
    path.write_text(yaml.safe_dump(content))
    return of_kind(render(path, ClusterSettings()), kind)


def test_the_rayservice_answers_and_its_probes_too(
    s3: Seaweed, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    store = open_store(s3.uri("tandem", "store"))
    publish_mlp(store, "digits", favourite=3)
    model = {"model": "digits@live", "replicas": {"min": 1, "max": 1, "cpus": 1}}
    service = rendered(
        folder / "s.yaml", {"store": store.uri, "models": [model], "keys": "off"}, "RayService"
    )
    cluster = service["spec"]["rayClusterConfig"]
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]
    chief = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    # What the operator sets for `authOptions`.
    operators = {"RAY_AUTH_MODE": cluster["authOptions"]["mode"], "RAY_AUTH_TOKEN": TOKEN}
    with head(worker, 1, folder, {**operators, "PYTHONPATH": os.pathsep.join(import_path())}):
        client = httpx.Client(timeout=10, trust_env=False)

        def probe(container: dict[str, Any], kind: str) -> bool:
            asked = container[kind]["httpGet"]
            return client.get(f"http://127.0.0.1:{asked['port']}{asked['path']}").is_success

        until(lambda: probe(chief, "readinessProbe") and probe(chief, "livenessProbe"), 60)
        assert probe(worker, "livenessProbe")
        url = "http://127.0.0.1:8265/api/serve/applications/"
        config = yaml.safe_load(service["spec"]["serveConfigV2"])
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert client.put(url, json=config).status_code == 401
        assert client.put(url, json=config, headers=bearer).status_code == 200

        def running() -> bool:
            states = client.get(url, headers=bearer).json()["applications"].values()
            return bool(states) and all(state["status"] == "RUNNING" for state in states)

        until(running, 90)
        until(lambda: probe(worker, "readinessProbe"), 30)
        serve = next(port["containerPort"] for port in worker["ports"] if port["name"] == "serve")
        answer = client.post(
            f"http://127.0.0.1:{serve}/v1/models/digits:predict", json={"instances": [[0.0] * 64]}
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["predictions"][0]["label"] == LABELS[3]
        client.close()


def test_a_rayjob_commits_and_its_second_attempt_resumes(
    s3: Seaweed, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt's driver is killed; the second comes to a new Ray, as KubeRay's retry does."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    train_uri, eval_uri = write_digits(s3.uri("tandem", "digits"))
    store = open_store(s3.uri("tandem", "store"))
    recipe = {
        "model": "digits",
        "run": "digits-job",
        "task": "image-classification",
        "data": {"train": train_uri, "eval": eval_uri},
        "store": store.uri,
        "optimization": {"global_batch_size": 128, "epochs": 20, "learning_rate": 0.003},
        "checkpoint": {"every_s": None, "every_steps": 5},
        "gate": {"metric": "accuracy", "at_least": 0.5},
    }
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(recipe))
    manifests = render(path, ClusterSettings())
    spec = of_kind(manifests, "RayJob")["spec"]
    cluster = spec["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    # One node here is head and worker.
    env = [entry for group in groups for entry in group["template"]["spec"]["containers"][0]["env"]]
    operators = {"RAY_AUTH_MODE": cluster["authOptions"]["mode"], "RAY_AUTH_TOKEN": TOKEN}
    extra = {**operators, "PYTHONPATH": os.pathsep.join(import_path())}
    run = Run(store, "digits-job")

    def attempt(job_id: str, meanwhile: Callable[[], None]) -> str:
        """How one attempt at the job ended, on a Ray of its own."""
        home = folder / job_id[-1]
        home.mkdir()
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        with (
            head({"env": env}, 2, home, extra),
            httpx.Client(
                base_url="http://127.0.0.1:8265", headers=bearer, timeout=10, trust_env=False
            ) as api,
        ):
            until(lambda: api.get("/api/version").is_success, 60)
            job = {"entrypoint": spec["entrypoint"], "submission_id": job_id, "metadata": {}}
            until(lambda: api.post("/api/jobs/", json=job).is_success, 30)
            meanwhile()
            ended = ("SUCCEEDED", "FAILED", "STOPPED")
            until(lambda: api.get(f"/api/jobs/{job_id}").json()["status"] in ended, 90)
            return str(api.get(f"/api/jobs/{job_id}").json()["status"])

    def kill_after_a_commit() -> None:
        until(lambda: run.checkpoints().head() > 4, 90)  # fences of a start are some of them
        kill_driver("digits-job-1")

    with mounted(Path(RECIPE_DIR), of_kind(manifests, "ConfigMap")["data"]):
        assert attempt("digits-job-1", kill_after_a_commit) == "FAILED"
        assert run.result() is None
        assert attempt("digits-job-2", lambda: None) == "SUCCEEDED"
    starts = [event for event in read_events(store, run.prefix) if event["event"] == "attempt-started"]
    last = max(starts, key=lambda event: str(event["at"]))
    assert last["source"] == "store"
    assert last["step"] > 0
    result = run.result()
    assert result is not None
    assert (result.gate, result.version, result.steps) == ("passed", 1, 20 * 12)


def import_path() -> list[str]:
    """Where Tandem is, which a pod's image has installed."""
    return [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
