"""The gateway as a process of its own: real gRPC in, real HTTP out, models that come while it runs."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import yaml
from aiohttp import web

from serving.grpc.beside import serve_beside
from serving.grpc.messages import SERVICE, ModelReadyRequest, ModelReadyResponse
from serving.ingress import free_port

DEADLINE_S = 30.0


def write(path: Path, *models: str) -> None:
    served = [{"model": f"{model}@live"} for model in models]
    whole = {"store": "file:///nowhere", "models": served, "drain_s": 1}
    fresh = path.with_suffix(".new")
    fresh.write_text(yaml.safe_dump(whole))
    fresh.replace(path)  # as the kubelet does it: whole or not at all


@asynccontextmanager
async def ingress() -> AsyncIterator[str]:
    """An HTTP server that says of every model that it is ready."""

    async def ready(_: web.Request) -> web.Response:
        return web.json_response({"ready": True})

    app = web.Application()
    app.router.add_get("/v2/models/{model}/ready", ready)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


async def is_ready(address: str, model: str) -> bool | grpc.StatusCode:
    """What the gateway says of a model: an answer, or why there is none."""
    async with grpc.aio.insecure_channel(address) as channel:
        ask = channel.unary_unary(
            f"/{SERVICE}/ModelReady",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=ModelReadyResponse.FromString,
        )
        try:
            return bool((await ask(ModelReadyRequest(name=model), wait_for_ready=True, timeout=10)).ready)
        except grpc.aio.AioRpcError as error:
            return error.code()


async def until(address: str, model: str, wanted: bool | grpc.StatusCode) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while await is_ready(address, model) != wanted:
            await asyncio.sleep(0.02)


async def check_models_come_and_go(path: Path) -> None:
    address, stop = f"127.0.0.1:{free_port()}", asyncio.Event()
    write(path, "digits")
    async with ingress() as url:
        running = asyncio.create_task(serve_beside(path, address, url, stop, look_every_s=0.02))
        await until(address, "digits", True)
        assert await is_ready(address, "words") == grpc.StatusCode.NOT_FOUND
        write(path, "words")
        await until(address, "words", True)
        await until(address, "digits", grpc.StatusCode.NOT_FOUND)
        path.write_text("models: [")
        await asyncio.sleep(0)
        assert await is_ready(address, "words") is True, "a file that can't be read changes nothing"
        stop.set()
        await asyncio.wait_for(running, DEADLINE_S)


def test_models_come_and_go_with_the_file(tmp_path: Path) -> None:
    asyncio.run(check_models_come_and_go(tmp_path / "service.yaml"))


async def check_the_program(path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    write(path, "digits")
    async with ingress() as url:
        command = [sys.executable, "-m", "serving.grpc.beside", str(path), "--address", address]
        process = subprocess.Popen([*command, "--ingress", url], stderr=subprocess.DEVNULL)
        try:
            await until(address, "digits", True)
            process.send_signal(signal.SIGTERM)
            assert await asyncio.to_thread(process.wait, DEADLINE_S) == 0
        finally:
            process.kill()
            process.wait()


def test_the_program_of_the_sidecar_answers_and_ends_when_told(tmp_path: Path) -> None:
    asyncio.run(check_the_program(tmp_path / "service.yaml"))
