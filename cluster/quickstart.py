"""`tandem quickstart`: the whole path once, on real data, with nothing but this machine.

One local Ray trains handwritten digits with two workers, commits, gates, registers and promotes,
then serves the version; concurrent clients send the held-out digits over HTTP. With `cluster.cli`,
this is the one module of `cluster` that composes the others; only the CLI imports it.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from cluster.errors import TandemError, shown
from cluster.local import LocalRay

CLIENTS = 32
SECONDS_OF_LOAD = 3.0
SERVE_DEADLINE_S = 120
METRICS_DEADLINE_S = 8.0
STOP_DEADLINE_S = 40


@dataclass(frozen=True, slots=True)
class Measured:
    """What the clients saw. Latencies are from sending a request to having its whole answer."""

    requests: int
    failed: int
    accuracy: float
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    mean_batch_rows: float | None
    """Rows that ran together, as `/metrics` tells; None where it didn't tell in time."""


@dataclass(frozen=True, slots=True)
class Report:
    """What `tandem quickstart` found."""

    version: int
    url: str
    accuracy_over_http: float
    requests: int
    failed: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    mean_batch_rows: float | None
    training_samples_per_s: float
    commit_to_first_answer_s: float
    curl: str


def quickstart(folder: Path, *, keep: bool) -> Report:
    """Run the whole path; data, store and logs go below `folder`.

    Args:
        keep: leave it serving; `tandem down` ends it.

    Raises:
        TandemError: a step failed.
    """
    # Composition: these know nothing of one another, and cost imports that other commands don't need.
    from serving.ingress import ingress_env
    from training.data.samples import write_digits
    from training.progress import display
    from training.recipe import Recipe
    from training.run import train

    train_uri, eval_uri = write_digits(str(folder / "data"))
    recipe = Recipe.model_validate(
        {
            "model": "digits",
            "task": "image-classification",
            "data": {"train": train_uri, "eval": eval_uri},
            "store": str(folder / "store"),
            "workers": {"min": 2, "max": 2},
            "optimization": {
                "global_batch_size": 128,
                "epochs": 10,
                "learning_rate": 0.003,
                "warmup_steps": 10,
            },
            "checkpoint": {"every_s": 2},
            "gate": {"metric": "accuracy", "at_least": 0.97},
            "promote_to": "live",
        }
    )
    with ExitStack() as stack:
        local = LocalRay.start(
            num_cpus=max(2, os.cpu_count() or 1), env=ingress_env(), tied=not keep, purpose="quickstart"
        )
        stack.callback(local.stop)
        with display() as show:
            result = train(recipe, address=local.address, show=show)
        if result.version is None:
            raise TandemError("the digits did not pass their gate", got=shown(result.metrics))
        committed_s = time.monotonic()
        log = stack.enter_context((folder / "serve.log").open("w+"))
        server, ready = _serve(recipe.store, local, log, keep)
        stack.callback(_stop, server)
        url = str(ready["url"])
        images, labels = _held_out(eval_uri)
        first_s, measured = asyncio.run(_ask(f"{url}/v1/models/digits:predict", images, labels))
        if keep:
            local.note(url=url)
            stack.pop_all()
    sample = folder / "digit.png"
    sample.write_bytes(images[0])
    return Report(
        version=result.version,
        url=url,
        accuracy_over_http=measured.accuracy,
        **{k: v for k, v in asdict(measured).items() if k != "accuracy"},
        training_samples_per_s=result.samples_per_s,
        commit_to_first_answer_s=first_s - committed_s,
        curl=f"curl -s {url}/v1/models/digits:predict -H 'content-type: image/png' --data-binary @{sample}",
    )


def _serve(
    store: str, local: LocalRay, log: IO[str], keep: bool
) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    """`tandem serve` as a user would start it, on the same Ray; its line of JSON once it is ready."""
    command = [sys.executable, "-m", "cluster.cli", "serve", "digits@live"]
    command += ["--store", store, "--address", local.address, "--port", "0", "--json"]
    server = subprocess.Popen(
        command,
        env={**os.environ, **local.env, "TANDEM_LOCAL_ID": local.record.id},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=keep,
    )
    assert server.stdout is not None
    with _killed_after(server, SERVE_DEADLINE_S):
        line = server.stdout.readline()
    if not line:
        log.seek(0)
        raise TandemError(
            "serving did not start",
            got=shown(log.read()[-1000:].strip().rsplit("\n", 1)[-1]),
            fix=f"see {log.name}",
        )
    return server, json.loads(line)


@contextmanager
def _killed_after(process: subprocess.Popen[str], deadline_s: float) -> Iterator[None]:
    from threading import Timer

    timer = Timer(deadline_s, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _stop(server: subprocess.Popen[str]) -> None:
    server.terminate()
    try:
        server.wait(STOP_DEADLINE_S)
    except subprocess.TimeoutExpired:
        server.kill()


def _held_out(uri: str) -> tuple[list[bytes], list[str]]:
    from training.data.dataset import Dataset

    dataset = Dataset.open(uri)
    table = dataset.read_rows(np.arange(dataset.rows), ["image", "label"])
    return table["image"].to_pylist(), [str(label) for label in table["label"].to_pylist()]


async def _ask(url: str, images: list[bytes], labels: list[str]) -> tuple[float, Measured]:
    """Send every image at least once from 32 clients; give when the first answer came, and figures."""
    import aiohttp

    latencies_s: list[float] = []
    right: dict[int, bool] = {}
    failed = 0
    headers = {"content-type": "image/png"}

    async def one(session: aiohttp.ClientSession, n: int) -> None:
        nonlocal failed
        sent_s = time.monotonic()
        async with session.post(url, data=images[n], headers=headers) as answer:
            body = await answer.json()
            latencies_s.append(time.monotonic() - sent_s)
            if answer.status != 200:
                failed += 1
                return
            right[n] = body["predictions"][0]["label"] == labels[n]

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(30)) as session:
        await one(session, 0)
        first_s = time.monotonic()
        latencies_s.clear()
        sent = 0

        async def client() -> None:
            nonlocal sent
            while sent < len(images) or time.monotonic() - first_s < SECONDS_OF_LOAD:
                n, sent = sent % len(images), sent + 1
                await one(session, n)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        took_s = time.monotonic() - first_s
        mean_batch_rows = await _mean_batch_rows(session, url, len(latencies_s))
    p50_s, p99_s = np.percentile(latencies_s, [50, 99])
    return first_s, Measured(
        requests=len(latencies_s),
        failed=failed,
        accuracy=sum(right.values()) / len(images),
        requests_per_s=len(latencies_s) / took_s,
        p50_ms=float(p50_s) * 1000,
        p99_ms=float(p99_s) * 1000,
        mean_batch_rows=mean_batch_rows,
    )


async def _mean_batch_rows(session: Any, url: str, answered: int) -> float | None:
    """From the service's own metrics, once they have caught up with what the clients counted."""
    page_url = url.partition("/v1/")[0] + "/metrics"
    deadline_s = time.monotonic() + METRICS_DEADLINE_S
    while time.monotonic() < deadline_s:
        async with session.get(page_url) as answer:
            page = await answer.text()
        rows, batches = (
            sum(float(value) for value in re.findall(rf"^tandem_{what}_total{{.*}} (\S+)$", page, re.M))
            for what in ("rows", "batches")
        )
        if rows >= answered and batches:
            return rows / batches
        await asyncio.sleep(0.5)
    return None
