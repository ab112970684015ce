"""The load: wrk with one thread, a closed loop over keep-alive connections, one fixed body."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

SCRIPT = Path(__file__).with_name("post.lua")
INSTALL = "wrk is needed: apt-get update && apt-get install -y wrk"
GRACE_S = 30


@dataclass(frozen=True)
class Load:
    """What came back. `refused`: answers with a status of 400 or more; `broken`: no whole answer."""

    requests: int
    seconds: float
    refused: int
    broken: int
    p50_ms: float
    p99_ms: float

    @property
    def requests_per_s(self) -> float:
        """Good answers a second."""
        return (self.requests - self.refused) / self.seconds


def find_wrk() -> str | None:
    """The path of wrk, None where it isn't installed."""
    return shutil.which("wrk")


def drive(
    url: str, body: Path, *, connections: int, seconds: int, headers: Mapping[str, str] | None = None
) -> Load:
    """Post `body`'s bytes to `url` for some seconds, as JSON if `headers` don't say otherwise.

    Raises:
        subprocess.SubprocessError: wrk failed or hung.
    """
    wrk = find_wrk()
    assert wrk, INSTALL
    done = subprocess.run(
        [
            *(wrk, "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s"),
            *("-s", str(SCRIPT), url, "--", str(body)),
            *chain.from_iterable((headers or {}).items()),
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=seconds + GRACE_S,
    )
    return Load(**json.loads(done.stdout.splitlines()[-1]))
