"""The real Prometheus, fed with a page of our own; and what dashboards and alerts ask of it."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

from serving.account import Account
from serving.metric_table import METRICS
from serving.metrics import ReplicaMetrics

MONITORING = Path(__file__).parents[1] / "k8s" / "monitoring"
READY_WITHIN_S = 30
_LINE = re.compile(r"address=(127\.0\.0\.1:[1-9]\d*)")


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MONITORING / "dashboards" / "serving.json").read_text())
    return found


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[str]:
    """Every query of the dashboard, its variables filled in as Grafana does, and of the rules."""
    asked = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    filled = [expr.replace("$__rate_interval", "1m").replace("$model", ".*") for expr in asked]
    return filled + [rule["expr"] for rule in rules()]


def agent_page(model: str = "digits") -> str:
    """What a node's agent would expose of a replica that has answered: Ray adds the ends of names."""
    metrics = ReplicaMetrics(model)
    account = Account(version="3", rows=1, decode_s=0.001, queue_s=0.002, run_s=0.02, encode_s=0.0001)
    for status in (200, 200, 503):
        metrics.answered("infer", status, 0.025, account)
    metrics.ran(4, 0.02)
    metrics.dropped(1)
    metrics.refused("deadline")
    metrics.late()
    metrics.swapped("3")
    metrics.loaded(1.5, hits=1, misses=0)
    metrics.scored("3", 0.5)
    tally, gauges = metrics.take()
    pages: dict[str, list[str]] = {}

    def add(name: str, labels: dict[str, str], value: float, kind: str) -> None:
        lines = pages.setdefault(name, [f"# HELP ray_{name} x", f"# TYPE ray_{name} {kind}"])
        written = {**labels, "SessionName": "s", "WorkerId": "w"}
        text = ",".join(f'{key}="{value}"' for key, value in sorted(written.items()))
        lines.append(f"ray_{name}{{{text}}} {float(value)}")

    def named(name: str, labels: tuple[str, ...]) -> dict[str, str]:
        return {"model": model, **dict(zip(METRICS[name].labels, labels, strict=True))}

    for (name, labels), number in tally.counts.items():
        if number:
            add(name, named(name, labels), number, "counter")
    for (name, labels), values in tally.distributions.items():
        for le, number in values.cumulative():
            if number:
                add(f"{name}_bucket_total", {**named(name, labels), "le": le}, number, "counter")
        add(f"{name}_sum_total", named(name, labels), values.total, "counter")
        add(f"{name}_count_total", named(name, labels), values.count, "counter")
    for (name, labels), value in gauges.items():
        add(name, named(name, labels), value, "gauge")
    return "\n".join(line for lines in pages.values() for line in lines)


@contextmanager
def serving_page(page: bytes) -> Iterator[str]:
    """A web server that answers with `page`; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.send_header("content-length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def prometheus(program: str, target: str, folder: Path) -> Iterator[httpx.Client]:
    """Prometheus, which scrapes `target` every second and has our rules; gives a client of its API."""
    file = folder / "prometheus.yaml"
    scrape = {"job_name": "tandem", "static_configs": [{"targets": [target]}]}
    settings = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(MONITORING / "alerts.yaml")],
        "scrape_configs": [scrape],
    }
    file.write_text(yaml.safe_dump(settings))
    command = [
        program,
        f"--config.file={file}",
        f"--storage.tsdb.path={folder / 'data'}",
        "--web.listen-address=127.0.0.1:0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    reader = threading.Timer(READY_WITHIN_S, process.kill)  # ends the loop below where it says nothing
    reader.start()
    drain: threading.Thread | None = None
    try:
        address, said = None, []
        for line in process.stderr:
            said.append(line)
            if found := _LINE.search(line):
                address = found.group(1)
                break
        reader.cancel()
        assert address is not None, "".join(said)[-2000:]
        # What it says from here on must not fill the pipe.
        drain = threading.Thread(target=_drain, args=(process.stderr,), daemon=True)
        drain.start()
        with httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=10) as client:
            yield client
    finally:
        reader.cancel()
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if drain is not None:
            drain.join()
        process.stderr.close()


def _drain(lines: Any) -> None:
    for _ in lines:
        pass
