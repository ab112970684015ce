"""One Ray head as KubeRay starts it in a pod: with the manifest's environment, on the ports it has there.

Started behind `IN_A_NETWORK_OF_ITS_OWN`, a process and all that it starts have a loopback that nobody else
is on, so the fixed ports of Ray and HAProxy are free, as in a pod. What it mounts, nobody else sees.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

IN_A_NETWORK_OF_ITS_OWN = ("unshare", "--net", "--mount", "sh", "-c", 'ip link set lo up && exec "$@"', "-")
"""Goes before a command. Needs the right to make namespaces."""
_MARK = "TANDEM_TEST_POD"
_GONE_WITHIN_S = 15.0


@contextmanager
def head(container: Mapping[str, Any], cpus: int, folder: Path, extra: Mapping[str, str]) -> Iterator[None]:
    """`ray start --head` with the environment of a rendered Ray container and `extra`; gone at the end.

    A pod has /tmp to itself. Here Ray's and HAProxy's files go to `folder`, which must have a short path.
    """
    mark = secrets.token_hex(8)
    rendered = {entry["name"]: entry["value"] for entry in container["env"] if "value" in entry}
    files = {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/a",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/m",
        "HOME": str(folder),
        "TMPDIR": str(folder),
    }
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env = {**os.environ, "PATH": path, "RAY_USAGE_STATS_ENABLED": "0", **rendered, **files, **extra}
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        f"--num-cpus={cpus}",
        "--node-ip-address=127.0.0.1",
        "--dashboard-host=0.0.0.0",
        "--dashboard-agent-listen-port=52365",
        "--metrics-export-port=8080",
        f"--temp-dir={folder}/ray",
        f"--object-store-memory={100 << 20}",
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env={**env, _MARK: mark}, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.kill()
            process.wait()
            _end(mark)


@contextmanager
def mounted(folder: Path, files: Mapping[str, str]) -> Iterator[None]:
    """`files` in `folder`, as a pod has a ConfigMap; seen from this mount namespace alone."""
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], check=True, capture_output=True)
        try:
            for name, text in files.items():
                (folder / name).write_text(text)
            yield
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)
    finally:
        if made:
            folder.rmdir()


def kill_driver(job_id: str) -> None:
    """SIGKILL to the processes that a Ray job's entrypoint has become."""
    for process in psutil.process_iter():
        try:
            config, command = process.environ().get("RAY_JOB_CONFIG_JSON_ENV_VAR", ""), process.cmdline()
            if f'"{job_id}"' in config and any(word.endswith("/tandem") for word in command):
                process.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue


def _end(mark: str) -> None:
    """Kill what bears the mark, until nothing does."""
    give_up_s = time.monotonic() + _GONE_WITHIN_S
    while left := _marked(mark):
        assert time.monotonic() < give_up_s, "a killed process is still there"
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.05)


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found
