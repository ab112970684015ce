"""The gateway as a process of its own beside an HTTP ingress: `python -m serving.grpc.beside`.

On Kubernetes every pod that takes HTTP has an ingress, and this runs beside it: gRPC is then to be had
wherever HTTP is, and goes with the pod. (As a Serve application it would have to be placed on each of those
nodes and no other, and nothing would tell a load balancer where it is.) It starts without Ray.

The service's file may change while this runs, as `serveConfigV2` does: models come and go without a restart.
The longest message is what the file allowed at the start.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster.config import load_yaml
from cluster.errors import TandemError
from serving.grpc.gateway import Gateway
from serving.grpc.ingress import Ingress
from serving.grpc.server import start_server
from serving.key_watch import watch_keys
from serving.service import Service

logger = logging.getLogger("tandem.serving")

LOOK_EVERY_S = 10.0


async def serve_beside(
    path: Path, address: str, ingress_url: str, stop: asyncio.Event, look_every_s: float = LOOK_EVERY_S
) -> None:
    """Answer gRPC until told to stop; then answer what is here, and return.

    Args:
        path: the service's file, looked at again and again.
        address: `HOST:PORT` to listen at.
        ingress_url: of the HTTP ingress.
        stop: set to stop.
        look_every_s: between two looks at the file.

    Raises:
        BadInput: the file can't be read at the start, or nothing can listen at the address.
    """
    service = load_yaml(Service, path)
    watch = await asyncio.to_thread(watch_keys, service, asyncio.get_running_loop(), None)
    async with Ingress(ingress_url) as ingress:
        gateway = Gateway(service, ingress, watch.guard if watch else None)
        server = await start_server(gateway, address)
        logger.info("gRPC at %s, by way of %s", address, ingress_url)
        try:
            await _follow(path, service, gateway, stop, look_every_s)
        finally:
            await server.stop(service.drain_s)
            if watch is not None:
                watch.stop()


async def _follow(
    path: Path, service: Service, gateway: Gateway, stop: asyncio.Event, look_every_s: float
) -> None:
    """Keep the gateway's models those of the file. One that can't be read changes nothing."""
    while not stop.is_set():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), look_every_s)
        try:
            found = await asyncio.to_thread(load_yaml, Service, path)
        except TandemError as error:
            logger.warning("the service's file can't be read, and stays as it was: %s", error)
            continue
        if found != service:
            service = found
            gateway.replace(service)


async def _until_told(path: Path, address: str, ingress_url: str) -> None:
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await serve_beside(path, address, ingress_url, stop)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m serving.grpc.beside")
    parser.add_argument("service", type=Path, help="the service's file")
    parser.add_argument("--address", required=True, help="HOST:PORT to listen at")
    parser.add_argument("--ingress", required=True, help="the URL of the HTTP ingress")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        asyncio.run(_until_told(given.service, given.address, given.ingress))
    except TandemError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
