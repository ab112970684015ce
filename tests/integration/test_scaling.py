"""Replicas follow the load: from none to one for the first request, to the maximum under more."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from servables import MLP, publish, slow_graph
from serving_process import processes_marked, serving, wait_until

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
