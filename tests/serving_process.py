"""`tandem serve` as a user starts it: a process of its own, ready with its line, drained at the end."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

READY_WITHIN_S = 90
STOP_WITHIN_S = 60
MARK = "TANDEM_TEST_MARK"


@dataclass
class ServiceProcess:
    """A service that runs. `mark` is in the environment of every process it started."""

    process: subprocess.Popen[str]
    url: str
    models: list[dict[str, Any]]
    mark: str
    grpc_url: str | None = None

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, trust_env=False, timeout=30, **options)

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_WITHIN_S)


def processes_marked(mark: str) -> list[str]:
    """Command lines of living processes with the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()[:4]))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def processes(service: ServiceProcess, name: str) -> list[psutil.Process]:
    """A service's living processes that have `name` in the first two words of their command lines."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(MARK) == service.mark
            if ours and name in " ".join(process.cmdline()[:2]) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def serving(service: dict[str, Any], folder: Path, *options: str) -> Iterator[ServiceProcess]:
    """Run `tandem serve` on a service file, from its ready line until the end of the `with`."""
    mark = secrets.token_hex(8)
    file = folder / "service.yaml"
    file.write_text(json.dumps(service))  # JSON is YAML
    command = [sys.executable, "-m", "cluster.cli", "serve", str(file), "--port", "0", "--json", *options]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, env={**os.environ, MARK: mark}, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            line = _line(process)
            if line is None:
                process.kill()
                log.seek(0)
                raise AssertionError(f"not ready in {READY_WITHIN_S} s:\n{log.read()[-4000:]}")
            ready = json.loads(line)
            yield ServiceProcess(process, ready["url"], ready["models"], mark, ready["grpc_url"])
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(STOP_WITHIN_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            assert process.stdout is not None
            process.stdout.close()


def wait_until(true: Any, within_s: float = 30, every_s: float = 0.1) -> None:
    """Call `true` until it holds."""
    deadline_s = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline_s, f"not within {within_s} s"
        time.sleep(every_s)


def _line(process: subprocess.Popen[str]) -> str | None:
    import selectors

    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return (process.stdout.readline() or None) if selector.select(READY_WITHIN_S) else None
