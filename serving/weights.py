"""How much of a model's requests a replica should get, told to HAProxy where there are two kinds of replica.

HAProxy sends a request to the server that has the fewest, by its weight, in flight (`leastconn`). A replica's
weight is how many requests it may have in flight and still answer each of them in time: the capacity that it
has measured, times half the SLO, by the rows of a request; less where its queue is already older than that.
So a fast replica gets more of a load that is worth it, and an idle one is still asked whatever its speed.

HAProxy asks each second, by its `agent-check`: it connects to the replica's HTTP port + `TANDEM_WEIGHT_PORTS`
(`serving.ingress`) and reads one line, a percentage of a weight of 100. Who doesn't answer keeps its weight.
That costs nothing per request.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
from collections.abc import Callable

from serving.load import Load

logger = logging.getLogger("tandem.serving")

PORTS = "TANDEM_WEIGHT_PORTS"
"""The environment variable with the distance from a replica's HTTP port to that of its weight."""
HOST = "TANDEM_WEIGHT_HOST"
"""Where replicas listen for it: on loopback, unless HAProxies on other nodes ask, too."""
MOST = 100


def weight(load: Load | None, slo_s: float) -> int:
    """1 to `MOST`; `MOST` where nothing is known of the replica yet, so that it learns."""
    if load is None or not load.capacity_rows_per_s:
        return MOST
    rows_each = load.arriving_rows_per_s / load.arrivals_per_s if load.arrivals_per_s > 0 else 1.0
    in_flight = load.capacity_rows_per_s * slo_s / 2 / max(rows_each, 1.0)
    late = max(1.0, load.oldest_waiting_s / (slo_s / 2))
    return min(MOST, max(1, math.floor(in_flight / late)))


class WeightTeller:
    """Tells this replica's weight. Lives on the event loop.

    Args:
        load: how busy the replica is.
        host: where to listen.
    """

    def __init__(self, load: Callable[[], Load | None], slo_s: float, host: str) -> None:
        self._load = load
        self._slo_s = slo_s
        self._host = host
        self._server: asyncio.Server | None = None

    async def start(self, http_port: int) -> None:
        """Listen beside the replica's HTTP port. Where that can't be, the weight stays as it is at first."""
        distance = int(os.environ.get(PORTS, "0"))
        if not distance:
            return
        try:
            self._server = await asyncio.start_server(self._tell, self._host, http_port + distance)
        except OSError as error:
            logger.warning("the replica can't tell its weight, requests are spread evenly: %s", error)

    async def stop(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    async def _tell(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(b"%d%%\n" % weight(self._load(), self._slo_s))
            await writer.drain()
        except OSError:
            pass  # it will ask again
        finally:
            writer.close()
