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
from ray_pod import head
from seaweed import Seaweed
from servables import LABELS, publish_mlp

from cluster.storage import open_store
from k8s.render import render
from k8s.settings import ClusterSettings

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


def import_path() -> list[str]:
    """Where Tandem is, which a pod's image has installed."""
    return [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
