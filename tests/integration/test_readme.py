"""Every command of the README, run in order in an empty folder, as a reader would.

Code blocks with a file's name in their first line become that file. `sh` blocks are run; `sh server`
blocks run in the background until the next `## ` heading; `sh fails` must exit with 2.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPO = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
_BLOCK = re.compile(r"^```(\w+)( \w+)?\n(.*?)^```$|^(## [^\n]*)$", re.M | re.S)
_READY_S = 90


class Block(NamedTuple):
    language: str
    mode: str
    text: str


def blocks() -> Iterator[Block]:
    """The README's code blocks and headings, in order."""
    for language, mode, text, heading in _BLOCK.findall((REPO / "README.md").read_text("utf-8")):
        yield Block("heading", "", heading) if heading else Block(language, mode.strip(), text)


def is_make(block: Block) -> bool:
    """The first block's targets are what CI itself runs; running them here would be a circle."""
    return block.text.startswith("make ")


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (REPO / "Makefile").read_text()
    named = [line.split()[1] for b in blocks() if is_make(b) for line in b.text.splitlines()]
    assert named == ["quickstart", "test"]
    assert all(f"\n{target}:" in makefile for target in named)


@pytest.mark.timeout(420)
def test_every_command_of_the_readme_works(tmp_path: Path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "TANDEM_"))}
    env |= {
        "PATH": f"{BIN}{os.pathsep}{env['PATH']}",
        "TANDEM_STATE_DIR": str(tmp_path / "state"),
        "HOME": str(tmp_path),
    }
    folder = tmp_path / "work"
    folder.mkdir()
    assert sum(block.language == "sh" for block in blocks()) > 5
    server: subprocess.Popen[bytes] | None = None
    try:
        for block in blocks():
            named = re.match(r"# (\S+\.(?:yaml|py))\n", block.text)
            if block.language == "heading":
                server = stop(server)
            elif named:
                (folder / named[1]).write_text(block.text)
            elif block.mode == "server":
                server = start(block, folder, env)
            elif block.language == "sh" and not is_make(block):
                run(block, folder, env)
    finally:
        stop(server)
        subprocess.run([BIN / "tandem", "down"], env=env, timeout=60, check=False)


def run(block: Block, folder: Path, env: dict[str, str]) -> None:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    wanted = 2 if block.mode == "fails" else 0
    assert done.returncode == wanted, f"{block.text}\n{done.stdout}\n{done.stderr}"


def start(block: Block, folder: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    port = int(re.findall(r"--port (\d+)", block.text)[0])
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(["bash", "-c", f"exec {block.text}"], cwd=folder, env=env, stderr=log)
    deadline_s = time.monotonic() + _READY_S
    while time.monotonic() < deadline_s and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=2) as answer:
                if answer.status == 200:
                    return server
        except OSError:
            time.sleep(0.2)
    server.kill()
    raise AssertionError((folder / "server.log").read_text())


def stop(server: subprocess.Popen[bytes] | None) -> None:
    if server is None:
        return
    server.send_signal(signal.SIGTERM)
    try:
        assert server.wait(60) == 0
    finally:
        server.kill()
