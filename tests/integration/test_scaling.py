"""Replicas follow the load: from none to one for the first request, to the maximum under more."""

from __future__ import annotations

import contextlib
import csv
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from servables import MLP, publish, slow_graph
from serving_process import MARK, processes_marked, serving, wait_until

from cluster.storage import open_store

CLIENTS = 8
BODY = {"instances": [[0.0] * 64]}


@pytest.mark.timeout(200)
def test_replicas_grow_from_zero_to_the_maximum(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    publish(store, "slow", slow_graph(), MLP)
    model = {
        "model": "slow@live",
        "replicas": {"min": 0, "max": 2, "cpus": 0.5},
        "max_batch_size": 1,
        "slo_ms": 15_000,
    }
    with serving({"store": store.uri, "models": [model]}, tmp_path) as service:

        def replicas() -> int:
            return sum("ServeReplica" in line for line in processes_marked(service.mark))

        assert replicas() == 0
        with service.client() as client:
            assert client.post("/v1/models/slow:predict", json=BODY).status_code == 200, (
                "held until one is up"
            )
        assert replicas() == 1

        over = threading.Event()
        statuses: Counter[int] = Counter()

        def ask_for_ever() -> None:
            with service.client() as client:
                while not over.is_set():
                    statuses[client.post("/v1/models/slow:predict", json=BODY).status_code] += 1

        with ThreadPoolExecutor(CLIENTS) as pool:
            asking = [pool.submit(ask_for_ever) for _ in range(CLIENTS)]
            try:
                wait_until(lambda: replicas() == 2, within_s=90, every_s=0.5)
            finally:
                over.set()
            for one in asking:
                one.result(60)
        assert set(statuses) == {200}


@pytest.mark.timeout(200)
def test_a_second_kind_of_replica_comes_for_the_peak_and_is_asked_at_the_same_address(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    publish(store, "slow", slow_graph(), MLP)
    model = {
        "model": "slow@live",
        "replicas": {"min": 1, "max": 1, "cpus": 0.4, "cost_per_hour": 1},
        "other_replicas": {"min": 0, "max": 1, "cpus": 0.6, "cost_per_hour": 1},
        "max_batch_size": 1,
        "slo_ms": 15_000,
    }
    with serving({"store": store.uri, "models": [model]}, tmp_path) as service:
        assert not any(".other." in line for line in processes_marked(service.mark))
        over = threading.Event()
        statuses: Counter[int] = Counter()

        def ask_for_ever() -> None:
            with service.client() as client:
                while not over.is_set():
                    statuses[client.post("/v1/models/slow:predict", json=BODY).status_code] += 1

        with ThreadPoolExecutor(CLIENTS) as pool:
            asking = [pool.submit(ask_for_ever) for _ in range(CLIENTS)]
            try:
                wait_until(lambda: all(answered(service.mark).values()), within_s=90, every_s=0.5)
            finally:
                over.set()
            for one in asking:
                one.result(60)
        assert set(statuses) == {200}
        with service.client() as client:
            assert client.get("/-kinds/v2/health/ready").status_code == 404


def answered(mark: str) -> dict[str, int]:
    """How many requests HAProxy has sent to each kind of replica, by its own statistics."""
    found = {"model": 0, "other": 0}
    for process in psutil.process_iter(["name", "cmdline"]):
        with contextlib.suppress(psutil.Error, OSError):
            if process.name() != "haproxy" or process.environ().get(MARK) != mark:
                continue
            command = process.cmdline()
            folder = Path(command[command.index("-f") + 1]).parent
            for row in csv.reader(_told(folder / "a", "show stat http-tandem 4 -1")):
                if len(row) > 7 and "REPLICA" in row[1]:
                    found["other" if ".other." in row[1] else "model"] += int(row[7])
    return found


def _told(socket_path: Path, command: str) -> list[str]:
    with socket.socket(socket.AF_UNIX) as admin:
        admin.settimeout(5)
        admin.connect(str(socket_path))
        admin.sendall(f"{command}\n".encode())
        return b"".join(iter(lambda: admin.recv(65536), b"")).decode().splitlines()
