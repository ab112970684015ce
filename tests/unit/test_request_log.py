"""What is written down of requests, and what never is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from cluster.clock import SystemClock
from serving.http import Request
from serving.request_log import RequestLog
from serving.service import LogSettings

PARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class ManualClock(SystemClock):
    now_s = 100.0

    def monotonic_s(self) -> float:
        return self.now_s


async def _receive() -> dict[str, Any]:
    return {"type": "http.disconnect"}


def _request(headers: dict[bytes, bytes] | None = None) -> Request:
    return Request("POST", "/v2/models/m/infer", headers or {}, "id-1", _receive)


def _lines(file: Path) -> list[dict[str, Any]]:
    return [orjson.loads(line) for line in file.read_bytes().splitlines()] if file.exists() else []


def _log(file: Path, settings: LogSettings, clock: ManualClock, dice: float = 0.5, **more: Any) -> RequestLog:
    return RequestLog(file, settings, "m", clock=clock, dice=lambda: dice, **more)


def test_a_line_says_what_happened_and_no_secret(tmp_path: Path) -> None:
    log = _log(tmp_path / "logs" / "r.jsonl", LogSettings(sample=1), ManualClock())
    request = _request({b"traceparent": PARENT, b"authorization": b"Bearer secret", b"cookie": b"secret"})
    request.account.tenant, request.account.version, request.account.rows = "team", "3", 2
    request.account.queue_s, request.account.run_s = 0.001, 0.0205
    log.answered(request, "infer", 200, 0.025, "")
    log.write()
    text = (tmp_path / "logs" / "r.jsonl").read_text()
    (line,) = _lines(tmp_path / "logs" / "r.jsonl")
    assert "secret" not in text
    assert (line["id"], line["tenant"], line["version"], line["rows"]) == ("id-1", "team", "3", 2)
    assert line["trace"] == "0af7651916cd43dd8448eb211c80319c"
    assert line["ms"] == {"total": 25.0, "queue": 1.0, "decode": 0.0, "run": 20.5, "encode": 0.0}
    assert line["why"] == "sample"


def test_errors_are_written_at_a_bounded_rate(tmp_path: Path) -> None:
    clock = ManualClock()
    log = _log(tmp_path / "r.jsonl", LogSettings(sample=0, errors_per_s=2), clock)
    for _ in range(10):
        log.answered(_request(), "infer", 500, 0.1, "")
        log.answered(_request(), "infer", 404, 0.1, "")
    clock.now_s += 0.5
    log.answered(_request(), "infer", 503, 0.1, "")
    log.write()
    assert [line["status"] for line in _lines(tmp_path / "r.jsonl")] == [500, 500, 503]


@pytest.mark.parametrize(("dice", "lines"), [(0.0099, 1), (0.01, 0)])
def test_the_share_is_what_was_asked_for(tmp_path: Path, dice: float, lines: int) -> None:
    log = _log(tmp_path / "r.jsonl", LogSettings(errors=False), ManualClock(), dice)
    log.answered(_request(), "infer", 200, 0.1, "")
    log.write()
    assert len(_lines(tmp_path / "r.jsonl")) == lines


def test_a_full_file_makes_room(tmp_path: Path) -> None:
    log = _log(tmp_path / "r.jsonl", LogSettings(sample=1), ManualClock(), max_file_bytes=10)
    for _ in range(3):
        log.answered(_request(), "infer", 200, 0.1, "")
        log.write()
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl.1"]


def test_a_disk_that_fails_costs_lines_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = _log(tmp_path / "file" / "r.jsonl", LogSettings(sample=1), ManualClock())
    log.answered(_request(), "infer", 200, 0.1, "")
    log.write()
    assert log.lost_lines == 1


def test_the_thread_writes_what_is_left(tmp_path: Path) -> None:
    log = _log(tmp_path / "r.jsonl", LogSettings(sample=1), ManualClock())
    log.start()
    log.answered(_request(), "infer", 200, 0.1, "")
    log.stop()
    assert len(_lines(tmp_path / "r.jsonl")) == 1
