"""What a published figure must name: the machine, the commit, the day."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parents[2]


def machine_facts() -> dict[str, str]:
    """Facts in the order they are printed."""
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return {
        "cpu": _cpu_model(),
        "cores": f"{len(os.sched_getaffinity(0))} used of {os.cpu_count()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "load before": f"{load} (1, 5, 15 min)",
        "commit": _commit(),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def use_cores(count: int) -> None:
    """Keep this process, and all it starts, on the first `count` cores that it may use."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = " with uncommitted changes" if _git("status", "--porcelain", "-uno") else ""
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"
    return head + changed


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=REPO, capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.strip()


def distributions(*names: str) -> str:
    """Installed distributions and their versions, as one line."""
    return ", ".join(f"{name}=={version(name)}" for name in names)
