"""`/metrics`: the figures of every replica on every node, as one page for Prometheus.

Each node's agent exposes what the processes of its node recorded. This reads them all, keeps what is ours
and what Serve counts of deployments, drops the labels that say nothing to a user, and joins the families of
several nodes into one, since a page may describe a metric only once. A node that doesn't answer in time is
left out.
"""

from __future__ import annotations

import asyncio
import re
import urllib.request
from collections.abc import Iterable, Sequence

from cluster.clock import SYSTEM_CLOCK, Clock

NODE_TIMEOUT_S = 2.0
KEEP_S = 1.0
"""A page is given out again for this long, so that scraping often costs little."""
MAX_PAGE_BYTES = 64 * 1024 * 1024
_KEPT = re.compile(r"(?:# (?:HELP|TYPE) )?ray_(?:tandem_|serve_(?:num|deployment|replica|autoscaling)_)")
_FAMILY = re.compile(r"# (?:HELP|TYPE) (\S+)")
_DROPPED_LABEL = re.compile(r'(?:Component|SessionName|Version|otel_[a-z_]+)="(?:[^"\\]|\\.)*",?')


def merge(pages: Iterable[str]) -> str:
    """Join exposition pages: one description for each family, all its samples after it.

    `ray_tandem_…` becomes `tandem_…`; Serve's own keep their names.
    """
    families: dict[str, tuple[list[str], list[str]]] = {}
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
    lines = [line for heading, samples in families.values() for line in (*heading, *samples)]
    return "".join(f"{line}\n" for line in lines)


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
