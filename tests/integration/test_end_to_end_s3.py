"""The whole path on a real S3 server, as a user goes it: import, train, promote, serve, ask."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import yaml
from seaweed import Seaweed

from training.data.samples import write_digits

TANDEM = [sys.executable, "-m", "cluster.cli"]


def tandem(*words: str, env: dict[str, str], exit_code: int = 0, timeout_s: float = 150) -> Any:
    """Run a command to its end; its last line of JSON."""
    done = subprocess.run(
        [*TANDEM, *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == exit_code, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(300)
def test_train_and_serve_on_s3(s3_env: Seaweed, tmp_path: Path) -> None:
    env = dict(os.environ)
    train_uri, eval_uri = write_digits(s3_env.uri("tandem", "digits"))
    assert train_uri.startswith("s3://")
    store = s3_env.uri("tandem", "store")
    recipe = {
        "model": "digits",
        "task": "image-classification",
        "data": {"train": train_uri, "eval": eval_uri},
        "store": store,
        "workers": {"min": 2, "max": 2},
        "optimization": {"global_batch_size": 128, "epochs": 8, "learning_rate": 0.003},
        "checkpoint": {"every_s": 1},
        "gate": {"metric": "accuracy", "at_least": 0.95},
        "promote_to": "live",
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))

    result = tandem("train", str(path), "--json", env=env)
    assert (result["gate"], result["version"]) == ("passed", 1)
    assert result["metrics"]["accuracy"] >= 0.95
    assert result["steps"] == 8 * 12
    assert result["samples_per_s"] > 0
    refused = tandem("train", str(path), "gate.at_least=1.01", "--json", env=env, exit_code=3)
    assert (refused["gate"], refused["version"]) == ("failed", None)
    shown = tandem("models", "show", "digits", "--store", store, "--json", env=env)
    assert "live" in json.dumps(shown)

    server = subprocess.Popen(
        [*TANDEM, "serve", "digits@live", "--store", store, "--port", "0", "--json"],
        env=env,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        ready = json.loads(server.stdout.readline())
        assert ready["models"] == [{"model": "digits", "alias": "live", "version": 1}]
        ask(ready["url"], eval_uri)
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.communicate()


def ask(url: str, eval_uri: str) -> None:
    """Every held-out digit by the unmodified Triton client, one by a plain POST."""
    from training.data.dataset import Dataset

    dataset = Dataset.open(eval_uri)
    table = dataset.read_rows(np.arange(dataset.rows), ["image", "label"])
    images, labels = table["image"].to_pylist(), [str(n) for n in table["label"].to_pylist()]

    client = triton.InferenceServerClient(url.removeprefix("http://"))
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    assert {tensor["name"] for tensor in client.get_model_metadata("digits")["outputs"]} == {
        "label",
        "probabilities",
    }
    given = triton.InferInput("image", [len(images)], "BYTES")
    given.set_data_from_numpy(np.array(images, dtype=object))
    answer = client.infer("digits", [given])
    found = [label.decode() for label in answer.as_numpy("label")]
    assert np.mean([a == b for a, b in zip(found, labels, strict=True)]) >= 0.95
    client.close()

    one = httpx.post(
        f"{url}/v1/models/digits:predict", content=images[0], headers={"content-type": "image/png"}
    )
    assert one.status_code == 200
    assert one.json()["predictions"][0]["label"] == found[0]
    assert one.headers["x-model-version"] == "1"
    assert one.headers["x-request-id"]
