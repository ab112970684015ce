"""What is done to the configuration that Ray Serve writes for HAProxy, by the HAProxy that comes with Ray."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray.serve._private.common import RequestProtocol
from ray.serve._private.haproxy import (
    BackendConfig,
    HAProxyApi,
    HAProxyConfig,
    ServerConfig,
    get_haproxy_binary,
)

from serving import weights
from serving.ingress import free_ports
from serving.load import Load
from serving.weights import WeightTeller

SCRIPT = Path(weights.__file__).with_name("haproxy.sh")
OFFSET = 10
IN_FLIGHT = 44
DEADLINE_S = 20.0


def backend(name: str, prefix: str, *ports: int, fallback: int = 9) -> BackendConfig:
    return BackendConfig(
        name=f"http-{name}",
        path_prefix=prefix,
        app_name=name,
        servers=[ServerConfig(f"{name}-{port}", "127.0.0.1", port) for port in ports],
        fallback_server=ServerConfig("proxy", "127.0.0.1", fallback),
        protocol=RequestProtocol.HTTP,
    )


def configuration(folder: Path, port: int, backends: list[BackendConfig]) -> Path:
    """As Serve's own template has it."""
    config = HAProxyConfig(socket_path=str(folder / "a"), metrics_port=port + 1, stats_port=port + 2)
    config.http_options.host, config.http_options.port = "127.0.0.1", port
    api = HAProxyApi(config, {one.name: one for one in backends}, str(folder / "haproxy.cfg"))
    api._generate_config_file_internal()
    return folder / "haproxy.cfg"


def environment(port: int) -> dict[str, str]:
    return {
        **os.environ,
        "TANDEM_HAPROXY_BINARY": get_haproxy_binary(),
        weights.PORTS: str(OFFSET),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(port + 1),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(port + 2),
    }


def servers_of(text: str, name: str) -> list[str]:
    """The server lines of a backend."""
    section = text.split(f"\nbackend http-{name}\n", 1)[1].split("\nbackend ", 1)[0]
    return [line.strip() for line in section.splitlines() if line.strip().startswith("server ")]


def test_the_second_kind_stands_beside_the_first(tmp_path: Path) -> None:
    backends = [
        backend("svc", "/", 31001),
        backend("svc--a", "/v2/models/a", 31002, 31003),
        backend("svc--.other.a", "/-kinds/v2/models/a", 31004),
        backend("svc--b", "/v2/models/b"),
        backend("svc--.other.b", "/-kinds/v2/models/b", 31005),
    ]
    file = configuration(tmp_path, 31010, backends)
    subprocess.run([SCRIPT, "-c", "-f", str(file)], env=environment(31010), check=True, capture_output=True)
    text = file.read_text()
    of_a = servers_of(text, "svc--a")
    assert [line.split()[2] for line in of_a] == [
        "127.0.0.1:31004",
        "127.0.0.1:31002",
        "127.0.0.1:31003",
        "127.0.0.1:9",
    ]
    assert [line.split()[-1] for line in of_a[:3]] == ["31014", "31012", "31013"], (
        "where weights are asked for"
    )
    assert "agent" not in of_a[3]
    assert "31005" in servers_of(text, "svc--b")[0], "though none of the first kind runs"
    assert "agent" not in servers_of(text, "svc")[0], "nothing changes for a model of one kind"
    assert not [line for line in text.splitlines() if "use_backend" in line and ".other." in line]
    subprocess.run([SCRIPT, "-c", "-f", str(file)], env=environment(31010), check=True, capture_output=True)


def test_the_command_of_an_image_does_the_same(tmp_path: Path) -> None:
    file = configuration(
        tmp_path, 31010, [backend("svc", "/", 31001), backend("svc--.other.a", "/-kinds", 31002)]
    )
    env = {name: value for name, value in environment(31010).items() if name != "TANDEM_HAPROXY_BINARY"}
    command = [sys.executable, "-m", "serving.haproxy", "-c", "-f", str(file)]
    subprocess.run(command, env=env, check=True, capture_output=True)
    assert len([line for line in servers_of(file.read_text(), "svc") if "agent-check" in line]) == 2


def test_a_service_of_one_kind_is_left_as_it_is(tmp_path: Path) -> None:
    file = configuration(tmp_path, 31010, [backend("svc", "/", 31001)])
    before = file.read_text()
    subprocess.run([SCRIPT, "-c", "-f", str(file)], env=environment(31010), check=True, capture_output=True)
    assert file.read_text() == before


def test_nobody_is_told_that_a_model_is_unknown_before_any_is_known(tmp_path: Path) -> None:
    port = free_ports(3)
    file = configuration(tmp_path, port, [])
    with haproxy(file, port), connected(port) as asked:
        asked.sendall(b"GET /v2/models/a HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: asked.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1\r\n" in answer.lower()


def connected(port: int) -> socket.socket:
    """Once it listens."""
    give_up_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), DEADLINE_S)
        except ConnectionRefusedError:
            assert time.monotonic() < give_up_s, "it never listened"
            time.sleep(0.02)


@contextmanager
def haproxy(file: Path, port: int) -> Iterator[None]:
    process = subprocess.Popen([SCRIPT, "-f", str(file)], env=environment(port), stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


def load(capacity_rows_s: float) -> Load:
    return Load(
        waiting_requests=0,
        oldest_waiting_s=0.0,
        busy_fraction=0.5,
        capacity_rows_per_s=capacity_rows_s,
        arrivals_per_s=10.0,
        arriving_rows_per_s=10.0,
        lost_per_s=0.0,
    )


@pytest.mark.timeout(60)
def test_requests_in_flight_are_spread_by_what_each_can_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(weights.PORTS, str(OFFSET))
    first = free_ports(2 * OFFSET)
    slow, fast, port = first, first + 1, first + 5
    file = configuration(
        tmp_path, port, [backend("svc", "/", slow), backend("svc--.other.a", "/-kinds", fast)]
    )
    share = asyncio.run(_drive(file, port, {slow: 8.0, fast: 80.0}))
    # Of 44 in flight, 4 and 40: the one holds a tenth of what the other holds.
    assert share[slow] + share[fast] == IN_FLIGHT
    assert share[slow] == pytest.approx(4, abs=2)


async def _drive(file: Path, port: int, capacities: dict[int, float]) -> Counter[int]:
    """How many of so many requests each server holds, when none is answered before all have come."""
    held: Counter[int] = Counter()
    all_there = asyncio.Event()

    async def answer(own: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"GET /-/"):
            held[own] += 1
            if held.total() == IN_FLIGHT:
                all_there.set()
            await all_there.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async def get() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /x HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        status = await reader.readline()
        writer.close()
        return status

    async with asyncio.timeout(DEADLINE_S):
        servers, tellers = [], []
        for own, capacity_s in capacities.items():
            servers.append(
                await asyncio.start_server(lambda r, w, own=own: answer(own, r, w), "127.0.0.1", own)
            )
            tellers.append(WeightTeller(lambda c=capacity_s: load(c), 1.0, "127.0.0.1"))  # type: ignore[misc]
            await tellers[-1].start(own)
        with haproxy(file, port):
            socket = file.with_name("a")
            while await _weights(socket) != {"4", "40"}:
                await asyncio.sleep(0.1)
            statuses = await asyncio.gather(*(get() for _ in range(IN_FLIGHT)))
        for one in (*servers,):
            one.close()
        for teller in tellers:
            await teller.stop()
    assert set(statuses) == {b"HTTP/1.1 200 OK\r\n"}
    return held


async def _weights(socket: Path) -> set[str]:
    """The weights of the servers in the backend `http-svc` but the backup."""
    try:
        reader, writer = await asyncio.open_unix_connection(str(socket))
    except OSError:
        return set()
    writer.write(b"show servers state http-svc\n")
    lines = (await reader.read()).decode().splitlines()
    writer.close()
    return {words[7] for line in lines if len(words := line.split()) > 20 and words[3].startswith("svc")}
