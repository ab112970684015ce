"""Nothing is left behind: after the last test, no process and no temporary file of this session exists.

Every process started by a test inherits a mark in its environment, and a TMPDIR of the session's own.
Ports and actors go with their processes. Whatever is left after a short wait fails the session, by name.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

MARK = "TANDEM_TEST_SESSION"
GONE_WITHIN_S = 15.0
_KEPT = ("pytest-of-", "torchinductor_")
"""Folders that pytest and torch keep on purpose."""


def pytest_sessionstart(session: pytest.Session) -> None:
    os.environ[MARK] = secrets.token_hex(8)
    # Short, because the paths of Ray's sockets are limited to 107 characters.
    os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="tt-", dir="/tmp")
    tempfile.tempdir = None


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    left: list[str] = []
    give_up_s = time.monotonic() + GONE_WITHIN_S
    while time.monotonic() < give_up_s:
        left = _processes() + _files()
        if not left:
            break
        time.sleep(0.2)
    else:
        sys.stderr.write("\nleft behind by the tests:\n  " + "\n  ".join(left) + "\n")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


def _processes() -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.environ().get(MARK) == os.environ[MARK]
            if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"process {process.pid}: {' '.join(process.cmdline())[:200]}")
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def _files() -> list[str]:
    folder = Path(os.environ["TMPDIR"])
    return [f"file {path}" for path in folder.iterdir() if not path.name.startswith(_KEPT)]
