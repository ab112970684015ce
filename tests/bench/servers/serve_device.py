"""Ray Serve on the sleeping device: `@serve.batch` with a handler that yields, or a plain FIFO batcher.

Run as `python serve_device.py [--fifo] PORT`, with Serve's settings for HAProxy in the environment. `--fifo`
takes what waits, in order, whenever the device is free, pads to the longest, and drops what has expired: what
a careful user writes in twenty lines.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections import deque

import device
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

IN_FLIGHT = 100_000
WAIT_S = 0.010


@serve.deployment(max_ongoing_requests=IN_FLIGHT)
class Batched:
    """POST / {"due": T} gives {"due": T}."""

    @serve.batch(max_batch_size=device.MAX_ROWS, batch_wait_timeout_s=WAIT_S)
    async def predict(self, dues_s: list[float]) -> list[float]:
        device.note(dues_s, (), 0)
        await asyncio.sleep(device.duration_s(len(dues_s), 0))
        return dues_s

    async def __call__(self, request: Request) -> dict[str, float]:
        body = await request.json()
        return {"due": await self.predict(body["due"])}


@serve.deployment(max_ongoing_requests=IN_FLIGHT)
class Fifo:
    """POST / of a row's elements as bytes, and its time in `x-due`, gives {"due": T}, or 503."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[float, int, asyncio.Future[bool]]] = deque()
        self._running = False

    async def __call__(self, request: Request) -> Response:
        due_s, length = float(request.headers["x-due"]), len(await request.body())
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((due_s, length, future))
        if not self._running:
            self._running = True
            self._task = asyncio.ensure_future(self._work())
        return JSONResponse({"due": due_s}, status_code=200 if await future else 503)

    async def _work(self) -> None:
        while self._waiting:
            batch = []
            while self._waiting and len(batch) < device.MAX_ROWS:
                due_s, length, future = self._waiting.popleft()
                if due_s < asyncio.get_running_loop().time():  # the same clock: monotonic
                    future.set_result(False)
                else:
                    batch.append((due_s, length, future))
            if batch:
                lengths = [length for _, length, _ in batch]
                await asyncio.to_thread(device.run, [due for due, _, _ in batch], lengths, max(lengths))
                for _, _, future in batch:
                    future.set_result(True)
        self._running = False


def main(port: int, fifo: bool) -> None:
    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run((Fifo if fifo else Batched).bind())
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[-1]), "--fifo" in sys.argv)
