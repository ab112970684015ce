"""A replica's latency, capacity and cold start, measured: a live service is sent requests and watched.

    latency     one request at a time, of 1, a few and many rows: each is a batch of its own. How long batches
                ran is read from the service's own metrics, which don't know of the way there and back;
                what that adds is told apart.
    capacity    as many requests in flight as two full batches have rows: rows a second that were answered.
                It isn't what the simulator reckons with (that follows from the latency), but says whether
                the reckoning holds.
    cold start  of a service file: it is started with no replica, and the first request is timed.

Rows are blank ones of the shapes that the model says it takes; a model whose time depends on what is in them
is to be measured under its own load (`serving.simulator.calibrate.watch`).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import BadInput, NotReady, shown
from serving.service import ServedModel, Service
from serving.simulator.calibrate import watch

EACH_S = 4.0
"""How long each size of batch is sent."""
_LOOK_S = 1.0
_LAG_S = 4.0
"""Counters reach `/metrics` so long after what they count."""
_MOST_IN_FLIGHT = 64
_TIMEOUT_S = 60.0
_READY_S = 120.0


@dataclass(frozen=True, slots=True)
class Measured:
    """A replica: a batch of n rows takes `base_s + row_s * n`."""

    base_s: float
    row_s: float
    beside_s: float
    """What an answer of one row takes besides its batch: HTTP, decoding, waiting for a thread."""
    answered_rows_s: float
    """With two full batches in flight, by all replicas together."""
    cold_start_s: float | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """One model at one address."""

    host: str
    port: int
    model: str
    inputs: tuple[Mapping[str, Any], ...]

    @property
    def path(self) -> str:
        """Where it is asked."""
        return f"/v2/models/{self.model}/infer"

    def body(self, rows: int) -> bytes:
        """A request of so many blank rows."""
        inputs = []
        for tensor in self.inputs:
            shape = [rows, *(abs(size) for size in tensor["shape"][1:])]
            blank = {"BOOL": False, "BYTES": ""}.get(tensor["datatype"], 0)
            inputs.append({**tensor, "shape": shape, "data": [blank] * math.prod(shape)})
        return json.dumps({"inputs": inputs}).encode()


def measure(
    url: str, model: str | None, *, max_batch: int, each_s: float = EACH_S, clock: Clock = SYSTEM_CLOCK
) -> Measured:
    """Measure a service that runs. It should have nothing else to do, and one replica.

    Args:
        model: which of its models; None where it has one.
        max_batch: rows that it runs at once.

    Raises:
        BadInput: there is no such service, or its model takes what can't be made up.
        NotReady: it answered nothing.
    """
    probe = _probe(url, model)
    _ask(probe, 1)  # wakes it
    sizes = sorted({1, max(1, round(max_batch**0.5)), max(1, max_batch // 2), max_batch})
    looks = math.ceil((len(sizes) * each_s + _LAG_S) / _LOOK_S)
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch, url, looks=looks, every_s=_LOOK_S, model=probe.model, clock=clock)
        one_s = [took for rows in sizes for took in _for_a_while(probe, rows, each_s, clock) if rows == 1]
        base_s, row_s = watching.result()
    if not one_s:
        raise NotReady(
            "it answered nothing in time", retry_after_s=1, fix="raise its slo_ms, or say --latency"
        )
    middle_s = sorted(one_s)[len(one_s) // 2]
    in_flight = min(2 * max_batch, _MOST_IN_FLIGHT)
    with ThreadPoolExecutor(in_flight) as pool:
        every = [pool.submit(_for_a_while, probe, 1, each_s, clock) for _ in range(in_flight)]
        answered = sum(len(one.result()) for one in every)
    return Measured(base_s, row_s, max(0.0, middle_s - base_s - row_s), answered / each_s)


def measure_service(
    service: Service, served: ServedModel, *, each_s: float = EACH_S, clock: Clock = SYSTEM_CLOCK
) -> Measured:
    """Serve one model of a service on this machine, with at most one replica, and measure it.

    Raises:
        BadInput: it can't be served, or its model takes what can't be made up.
        NotReady: it answered nothing.
    """
    replicas = served.replicas.model_copy(update={"min": 0, "max": 1, "idle_s": 3600})
    alone = served.model_copy(update={"replicas": replicas, "other_replicas": None, "pooled": False})
    only = service.model_copy(update={"models": (alone,), "pool": None, "keys": "off", "name": "calibration"})
    with _served(only) as url:
        address = urlsplit(url)
        began_s = clock.monotonic_s()
        _get(
            address.hostname or "", address.port or 80, f"/v2/models/{served.ref.model}"
        )  # held until it is up
        cold_start_s = clock.monotonic_s() - began_s
        found = measure(url, served.ref.model, max_batch=served.max_batch_size, each_s=each_s, clock=clock)
    return Measured(found.base_s, found.row_s, found.beside_s, found.answered_rows_s, cold_start_s)


@contextlib.contextmanager
def _served(service: Service) -> Iterator[str]:
    """`tandem serve`, and its address."""
    with (
        tempfile.TemporaryDirectory(prefix="tandem-calibrate-") as folder,
        open(f"{folder}/log", "w+") as log,
    ):
        file = Path(folder) / "service.yaml"
        file.write_text(service.model_dump_json())  # JSON is YAML
        command = [sys.executable, "-m", "cluster.cli", "serve", str(file), "--port", "0", "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        late = threading.Timer(_READY_S, process.terminate)
        try:
            late.start()
            line = process.stdout.readline() if process.stdout else ""
            late.cancel()
            if not line:
                log.seek(0)
                raise BadInput("the service can't be served to measure it", got=shown(log.read()[-500:]))
            yield str(json.loads(line)["url"])
        finally:
            late.cancel()
            process.terminate()
            process.wait(_TIMEOUT_S)
            if process.stdout:
                process.stdout.close()


def _probe(url: str, model: str | None) -> Probe:
    address = urlsplit(url)
    if address.scheme != "http" or not address.hostname:
        raise _no_service(url, "not an address")
    host, port = address.hostname, address.port or 80
    try:
        names = [model] if model else _models(json.loads(_get(host, port, "/openapi.json")))
        if len(names) != 1:
            raise BadInput("which model?", got=shown(url), allowed=", ".join(names), fix="say --model NAME")
        metadata = json.loads(_get(host, port, f"/v2/models/{names[0]}"))
        inputs = tuple(metadata["inputs"])
    except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        raise _no_service(url, str(error)) from None
    if any("content" in tensor.get("parameters", {}) for tensor in inputs):
        raise BadInput(
            f"'{names[0]}' takes images, which can't be made up",
            got=shown(url),
            fix="watch it under its own load with --watch, or say --latency BASE_S,ROW_S",
        )
    plain = tuple({key: tensor[key] for key in ("name", "datatype", "shape")} for tensor in inputs)
    return Probe(host, port, names[0], plain)


def _models(document: Mapping[str, Any]) -> list[str]:
    """The models of a service, by its OpenAPI document."""
    paths = (path.split("/") for path in document.get("paths", {}))
    return sorted({parts[3] for parts in paths if parts[1:3] == ["v2", "models"] and parts[-1] == "infer"})


def _get(host: str, port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise OSError(f"{path}: {answer.status} {text[:200].decode('utf-8', 'replace')}")
    return text


def _ask(probe: Probe, rows: int) -> None:
    """One request, whatever becomes of it."""
    connection = http.client.HTTPConnection(probe.host, probe.port, timeout=_TIMEOUT_S)
    _sender(connection, probe, rows)()
    connection.close()


def _for_a_while(probe: Probe, rows: int, duration_s: float, clock: Clock) -> list[float]:
    """Seconds of each request that was answered, one after the other on one connection."""
    connection = http.client.HTTPConnection(probe.host, probe.port, timeout=_TIMEOUT_S)
    send, took, end_s = _sender(connection, probe, rows), [], clock.monotonic_s() + duration_s
    while (began_s := clock.monotonic_s()) < end_s:
        if send() == 200:
            took.append(clock.monotonic_s() - began_s)
        else:
            clock.sleep(0.05)  # refused: not that many, or not now
    connection.close()
    return took


def _sender(connection: http.client.HTTPConnection, probe: Probe, rows: int) -> Callable[[], int]:
    body, headers = probe.body(rows), {"content-type": "application/json"}

    def send() -> int:
        try:
            connection.request("POST", probe.path, body, headers)
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            return 0
        return answer.status

    return send


def _no_service(url: str, why: str) -> BadInput:
    return BadInput(
        "can't calibrate: no service there",
        got=f"{shown(url)} ({shown(why)})",
        allowed="the address of a service that `tandem serve` runs, or the file of one",
        fix="say --latency BASE_S,ROW_S instead",
    )
