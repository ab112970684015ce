"""`/metrics`: the figures of every replica on every node, as one page for Prometheus.

Each node's agent exposes what the processes of its node recorded. This reads them all, keeps what is ours
and what Serve counts of deployments, drops the labels that say nothing to a user, and joins the families of
several nodes into one, since a page may describe a metric only once. Histograms come as counters, one a
bucket (`serving.metrics` says why), and become histograms here. A node that doesn't answer in time is left
out.
"""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Iterable, Sequence

from cluster.clock import SYSTEM_CLOCK, Clock
from serving.metric_table import METRICS, Metric

NODE_TIMEOUT_S = 2.0
KEEP_S = 1.0
"""A page is given out again for this long, so that scraping often costs little."""
MAX_PAGE_BYTES = 64 * 1024 * 1024
_KEPT = re.compile(r"(?:# (?:HELP|TYPE) )?ray_(?:tandem_|serve_(?:num|deployment|replica|autoscaling)_)")
_FAMILY = re.compile(r"# (?:HELP|TYPE) (\S+)")
_DROPPED_LABEL = re.compile(r'(?:Component|SessionName|Version|otel_[a-z_]+)="(?:[^"\\]|\\.)*",?')
_LE = re.compile(r'(?<=[{,])le="([^"]*)",?')

Families = dict[str, tuple[list[str], list[str]]]
"""By name: what describes a family, and its samples."""


def merge(pages: Iterable[str]) -> str:
    """Join exposition pages: one description for each family, all its samples after it.

    `ray_tandem_…` becomes `tandem_…`; Serve's own keep their names.
    """
    families: Families = {}
    for page in pages:
        family = ""
        for line in page.splitlines():
            if not _KEPT.match(line):
                continue
            text = line.replace("ray_tandem_", "tandem_", 1)
            if described := _FAMILY.match(text):
                family = described.group(1)
                heading = families.setdefault(family, ([], []))[0]
                if text not in heading and len(heading) < 2:
                    heading.append(text)
            else:
                tidied = _DROPPED_LABEL.sub("", text, count=0).replace(",}", "}", 1)
                families.setdefault(family, ([], []))[1].append(tidied)
    for metric in METRICS.values():
        if metric.kind == "histogram" and f"{metric.name}_count_total" in families:
            families[metric.name] = _histogram(metric, families)
    lines = [line for heading, samples in families.values() for line in (*heading, *samples)]
    return "".join(f"{line}\n" for line in lines)


def _histogram(metric: Metric, families: Families) -> tuple[list[str], list[str]]:
    """Take the counters of a histogram out of `families`, and give the histogram."""
    buckets: dict[str, dict[str, str]] = {}
    for line in families.pop(f"{metric.name}_bucket_total", ([], []))[1]:
        labels, _, value = line.partition("{")[2].rpartition(" ")
        bound = _LE.search("{" + labels)
        if bound is not None:
            rest = _LE.sub("", "{" + labels, count=1).removeprefix("{").removesuffix("}").rstrip(",")
            buckets.setdefault(rest, {})[bound.group(1)] = value
    samples = []
    for rest, values in buckets.items():
        comma = "," if rest else ""
        # A counter that never counted isn't there: the buckets below the smallest value.
        for bound_text in (*(f"{bound:g}" for bound in metric.bounds), "+Inf"):
            value = values.get(bound_text, "0.0")
            samples.append(f'{metric.name}_bucket{{{rest}{comma}le="{bound_text}"}} {value}')
    for part in ("sum", "count"):
        old = f"{metric.name}_{part}_total"
        samples += [line.replace(old, f"{metric.name}_{part}", 1) for line in families.pop(old, ([], []))[1]]
    return [f"# HELP {metric.name} {metric.text}", f"# TYPE {metric.name} histogram"], samples


class Scraper:
    """Gathers the page. One of these serves all requests of a process."""

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self._clock = clock
        self._lock = asyncio.Lock()
        self._page = b""
        self._gathered_s: float | None = None

    async def __call__(self) -> bytes:
        """The page, at most a second old."""
        async with self._lock:
            now_s = self._clock.monotonic_s()
            if self._gathered_s is None or now_s - self._gathered_s > KEEP_S:
                self._page = await asyncio.to_thread(_gather)
                self._gathered_s = self._clock.monotonic_s()
            return self._page


def _gather() -> bytes:
    from concurrent.futures import ThreadPoolExecutor

    urls = _agents()
    with ThreadPoolExecutor(max(1, min(32, len(urls)))) as pool:
        return merge(page for page in pool.map(_fetch, urls) if page).encode()


def _agents() -> Sequence[str]:
    import ray

    return [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"] and node.get("MetricsExportPort")
    ]


def _fetch(url: str) -> str:
    try:
        # Straight there, whatever proxy the environment names: the address is a node of this cluster.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=NODE_TIMEOUT_S) as answer:
            return str(answer.read(MAX_PAGE_BYTES).decode("utf-8", "replace"))
    except OSError:
        return ""
