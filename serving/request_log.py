"""A log of requests, a sample of them and the server's errors, as lines of JSON.

    {"time": "2026-01-31T12:00:00.123456Z", "why": "sample", "id": "…", "trace": "…", "tenant": "team",
     "model": "digits", "version": "3", "route": "infer", "status": 200, "rows": 1,
     "received_bytes": 310, "sent_bytes": 120,
     "ms": {"total": 3.1, "queue": 0.2, "decode": 0.1, "run": 2.4, "encode": 0.1}}

No body, no header, no key and no query string is ever in it. Each replica writes a file of its own into
Serve's log folder (`…/session_…/logs/serve/tandem-requests-MODEL-PID.jsonl`), where whatever ships Ray's
logs finds it; at 64 MiB it becomes `….jsonl.1`, over the one before.

A request that isn't chosen costs one random number. A line is put in memory and written by a thread; when
the disk can't keep up, lines are lost and counted, and requests don't wait.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

import orjson

from cluster.clock import SYSTEM_CLOCK, Clock
from serving.http import Request
from serving.service import LogSettings
from serving.trace_context import read

logger = logging.getLogger("tandem.serving")

MAX_WAITING_LINES = 10_000
MAX_FILE_BYTES = 64 * 1024 * 1024
WRITE_EVERY_S = 0.5
_SERVER_ERROR = 500


class RequestLog:
    """One replica's. `answered` is called on the event loop; a thread writes between `start` and `stop`.

    Args:
        file: where to; its folder is made.
        model: the name of the model.
        dice: gives numbers in [0, 1).
    """

    def __init__(
        self,
        file: Path,
        settings: LogSettings,
        model: str,
        *,
        clock: Clock = SYSTEM_CLOCK,
        dice: Callable[[], float] = random.random,
        max_file_bytes: int = MAX_FILE_BYTES,
    ) -> None:
        self.lost_lines = 0
        """Lines that could not be kept or written."""
        self._file = file
        self._settings = settings
        self._model = model
        self._clock = clock
        self._dice = dice
        self._max_file_bytes = max_file_bytes
        self._lines: deque[bytes] = deque()
        self._room = settings.errors_per_s
        self._room_at_s = clock.monotonic_s()
        self._failed = False
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def answered(self, request: Request, route: str, status: int, duration_s: float, trace: str) -> None:
        """Perhaps write this answer down.

        Args:
            trace: the id of the trace that was begun for it; empty where it has none but its caller's.
        """
        if self._dice() < self._settings.sample:
            why = "sample"
        elif status >= _SERVER_ERROR and self._settings.errors and self._error_has_room():
            why = "error"
        else:
            return
        if len(self._lines) >= MAX_WAITING_LINES:
            self.lost_lines += 1
            return
        self._lines.append(self._line(request, route, status, duration_s, trace, why))

    def start(self) -> None:
        """Begin to write."""
        self._thread = threading.Thread(target=self._write_for_ever, name="tandem-request-log", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write what is left, and end."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(5)

    def write(self) -> None:
        """Append what waits to the file. Never raises."""
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        if not lines:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("ab") as out:
                out.writelines(lines)
                full = out.tell() > self._max_file_bytes
            if full:
                self._file.replace(self._file.with_name(self._file.name + ".1"))
        except OSError as error:
            self.lost_lines += len(lines)
            if not self._failed:
                self._failed = True
                logger.warning("the request log can't be written (told once): %s", error)

    def _error_has_room(self) -> bool:
        now_s, most = self._clock.monotonic_s(), self._settings.errors_per_s
        self._room = min(max(most, 1.0), self._room + (now_s - self._room_at_s) * most)
        self._room_at_s = now_s
        if self._room < 1:
            return False
        self._room -= 1
        return True

    def _line(
        self, request: Request, route: str, status: int, duration_s: float, trace: str, why: str
    ) -> bytes:
        account = request.account
        phases = {
            "total": duration_s,
            "queue": account.queue_s,
            "decode": account.decode_s,
            "run": account.run_s,
            "encode": account.encode_s,
        }
        entry = {
            "time": self._clock.wall().strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "why": why,
            "id": request.id,
            "trace": trace or _trace_id(request),
            "tenant": account.tenant,
            "model": self._model,
            "version": account.version,
            "route": route,
            "status": status,
            "rows": account.rows,
            "received_bytes": account.received_bytes,
            "sent_bytes": account.sent_bytes,
            "ms": {name: round(seconds * 1000, 3) for name, seconds in phases.items()},
        }
        return orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE)

    def _write_for_ever(self) -> None:
        while not self._stopping.wait(WRITE_EVERY_S):
            self.write()
        self.write()


def _trace_id(request: Request) -> str:
    """The caller's trace, empty where it has none."""
    given = read(request.headers)
    return given.trace_id if given is not None else ""
