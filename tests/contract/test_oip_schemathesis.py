"""Schemathesis against the OpenAPI document that a replica gives out: whatever is sent, no 500.

A replica without Ray, behind the web server that Ray Serve uses, over real HTTP.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from servables import TABLE, publish, table_graph
from serving_process import wait_until

from cluster.names import ModelRef
from cluster.registry import Registry
from cluster.storage import memory_store
from serving.metrics import ReplicaMetrics
from serving.model_app import ModelApp
from serving.replica import Replica
from serving.service import ServedModel

EXAMPLES = 40


async def _no_metrics() -> bytes:
    return b""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    store = memory_store()
    publish(store, "table", table_graph(), TABLE)
    listener = socket.create_server(("127.0.0.1", 0))
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        metrics = ReplicaMetrics("table")
        replica = Replica(ServedModel(model="table@live"), store, metrics)
        replica.start(replica.load(Registry(store).resolve(ModelRef("table", "live"))))
        app = ModelApp(replica, metrics, _no_metrics)
        config = uvicorn.Config(app.serve_directly, interface="asgi3", lifespan="off", log_config=None)
        servers.append(uvicorn.Server(config))
        await servers[0].serve(sockets=[listener])
        await replica.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    wait_until(lambda: bool(servers) and servers[0].started)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    servers[0].should_exit = True
    thread.join(20)
    listener.close()
    assert not thread.is_alive()


def test_nothing_that_the_document_allows_or_forbids_is_a_500(url: str) -> None:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert len(operations) == 12
    seen: set[int] = set()
    modes = list(schemathesis.GenerationMode)
    cases = [operation.as_strategy(generation_mode=mode) for operation in operations for mode in modes]

    @settings(
        max_examples=EXAMPLES * len(operations),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        response = case.call(timeout=20)
        seen.add(response.status_code)
        assert response.status_code != 500, (case.as_curl_command(), response.text)

    given(st.one_of(cases))(check)()
    assert 200 in seen
    assert seen & {400, 422}
