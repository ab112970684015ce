"""A replica's latency, as a + b*n, from a service that runs: read from its `/metrics`.

A page has the rows and the seconds of all batches so far, as counters. Two pages some time apart give the
mean of what ran between them; several such pairs at different loads give a line through them. With one
load only, all that can be said is the mean: then the whole of it is taken as `a`, which is said.
"""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import BadInput, NotReady, shown

_TIMEOUT_S = 5.0
_MAX_PAGE_BYTES = 64 * 1024 * 1024
_SAMPLE = re.compile(r"^(tandem_[a-z_]+)(?:\{([^}]*)\})? (\S+)")


@dataclass(frozen=True, slots=True)
class Totals:
    """Counters of all replicas of a service, since their start."""

    batches: float
    rows: float
    batch_s: float


def read_totals(page: str, model: str | None = None) -> Totals:
    """The counters on an exposition page, of one model or of all."""
    sums = {"tandem_batches_total": 0.0, "tandem_rows_total": 0.0, "tandem_batch_seconds_sum": 0.0}
    for line in page.splitlines():
        found = _SAMPLE.match(line)
        if found and found[1] in sums and (model is None or f'model="{model}"' in (found[2] or "")):
            sums[found[1]] += float(found[3])
    return Totals(*sums.values())


def fit(pairs: Sequence[tuple[Totals, Totals]]) -> tuple[float, float]:
    """Seconds of a batch and of a row more, from counters before and after: least squares, by batches.

    Raises:
        NotReady: no batch ran.
    """
    points = [
        ((b.rows - a.rows) / ran, (b.batch_s - a.batch_s) / ran, ran)
        for a, b in pairs
        if (ran := b.batches - a.batches) > 0
    ]
    if not points:
        raise NotReady(
            "nothing to calibrate from: no batch ran while it was watched",
            retry_after_s=1,
            fix="send it requests meanwhile, at more than one rate",
        )
    rows, seconds, weights = np.array(points).T
    if rows.max() - rows.min() < 0.5:
        return float(np.average(seconds, weights=weights)), 0.0
    row_s, base_s = np.polyfit(rows, seconds, 1, w=np.sqrt(weights))
    return max(0.0, float(base_s)), max(0.0, float(row_s))


def watch(
    url: str, *, looks: int = 10, every_s: float = 2.0, model: str | None = None, clock: Clock = SYSTEM_CLOCK
) -> tuple[float, float]:
    """Watch a service for a while and fit its latency.

    Args:
        url: of the service; `/metrics` is added where it isn't there.
        looks: pairs of pages.

    Raises:
        BadInput: nothing answers there, or it isn't a page of ours.
        NotReady: no batch ran.
    """
    pages = [read_totals(_fetch(url), model)]
    for _ in range(looks):
        clock.sleep(every_s)
        pages.append(read_totals(_fetch(url), model))
    return fit(list(pairwise(pages)))


def _fetch(url: str) -> str:
    address = url if url.rstrip("/").endswith("/metrics") else url.rstrip("/") + "/metrics"
    if not address.startswith(("http://", "https://")):
        raise _not_a_service(url, "not an address")
    try:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(address, timeout=_TIMEOUT_S) as answer:
            return str(answer.read(_MAX_PAGE_BYTES).decode("utf-8", "replace"))
    except (OSError, ValueError) as error:
        raise _not_a_service(url, str(error)) from None


def _not_a_service(url: str, why: str) -> BadInput:
    return BadInput(
        "can't calibrate: no metrics there",
        got=f"{shown(url)} ({why})",
        allowed="the address of a service that `tandem serve` runs",
        fix="say --latency BASE_S,ROW_S instead",
    )
