"""When requests came: read from a file, made more intense, or made up from a seed.

A trace is an array of arrival times in seconds from the first one, in order. What a request asked for isn't
kept: the simulator's requests are rows of one model.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import BadInput, NotFound, shown

Times = NDArray[np.float64]

_ALLOWED = (
    "CSV with a column 'timestamp' (date and time) or 'seconds', JSONL with 'timestamp' in milliseconds"
)
_JITTER_S = 1.0
"""Copies of a request are spread over a second: bursts of a second stay, exact ties go."""


def read_trace(path: Path) -> Times:
    """Arrival times [requests], float64 seconds from the first, ascending.

    Raises:
        NotFound: there is no such file.
        BadInput: it isn't a trace.
    """
    if not path.is_file():
        raise NotFound(
            "there is no trace", got=shown(str(path)), allowed=_ALLOWED, fix="give the path of a file"
        )
    reader = _jsonl_seconds if path.suffix in (".jsonl", ".ndjson") else _csv_seconds
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            times_s = np.fromiter(reader(path, file), dtype=np.float64)
    except UnicodeDecodeError as error:
        raise _bad(path, 0, f"bytes that are not UTF-8 (byte {error.start})") from None
    if not times_s.size:
        raise _bad(path, 0, "no requests")
    if not np.isfinite(times_s).all():
        raise _bad(path, int(np.argmin(np.isfinite(times_s))) + 2, "a time that is not finite")
    times_s.sort()
    first_s: Times = times_s - times_s[0]
    return first_s


def scaled(times_s: Times, factor: float, seed: int = 0) -> Times:
    """`factor` times as many requests over the same time.

    Each request is there `factor` times, later by up to a second, so that the shape of the load and
    its bursts stay; of a broken factor, the rest is drawn.
    """
    draw = np.random.default_rng(seed)
    copies = np.full(times_s.size, int(factor)) + (draw.random(times_s.size) < factor - int(factor))
    repeated = np.repeat(times_s, copies)
    if factor > 1:
        repeated = repeated + draw.uniform(0.0, _JITTER_S, repeated.size)
    return np.sort(repeated)


def diurnal(rate_s: float, duration_s: float, seed: int = 0) -> Times:
    """A day in `duration_s`: a sine from a tenth of the peak to the peak, the mean being `rate_s`."""
    return _poisson(lambda t: rate_s * (1 - 0.82 * np.cos(2 * np.pi * t / duration_s)), duration_s, seed)


def bursts(rate_s: float, duration_s: float, seed: int = 0) -> Times:
    """A steady `rate_s`, with bursts of two to six times as much for 10 to 60 s every three minutes or so."""
    draw = np.random.default_rng(seed + 1)
    spans: list[tuple[float, float, float]] = []
    begin_s = draw.exponential(180.0)
    while begin_s < duration_s:
        spans.append((begin_s, begin_s + draw.uniform(10, 60), draw.uniform(2, 6)))
        begin_s = spans[-1][1] + draw.exponential(180.0)

    def rate(t: Times) -> Times:
        times = np.ones_like(t)
        for begin, end, height in spans:
            times[(t >= begin) & (t < end)] = height
        return rate_s * times

    return _poisson(rate, duration_s, seed)


def from_zero(rate_s: float, duration_s: float, seed: int = 0) -> Times:
    """Visits: nothing for some minutes, then `rate_s` for one to four."""
    draw = np.random.default_rng(seed + 1)
    spans: list[tuple[float, float]] = []
    begin_s = 1.0
    while begin_s < duration_s:
        spans.append((begin_s, begin_s + draw.uniform(60, 240)))
        begin_s = spans[-1][1] + draw.uniform(60, 600)

    def rate(t: Times) -> Times:
        visited = np.zeros_like(t)
        for begin, end in spans:
            visited[(t >= begin) & (t < end)] = rate_s
        return visited

    return _poisson(rate, duration_s, seed)


SYNTHETIC: dict[str, Callable[[float, float, int], Times]] = {
    "diurnal": diurnal,
    "bursts": bursts,
    "from-zero": from_zero,
}
"""Made-up traces by name: (mean rate per second, duration in seconds, seed)."""


def _poisson(rate: Callable[[Times], Times], duration_s: float, seed: int) -> Times:
    """Arrivals of an inhomogeneous Poisson process, whose rate is taken as constant over 0.1 s."""
    draw = np.random.default_rng(seed)
    grid_s = np.arange(0.0, duration_s, 0.1)
    counts = draw.poisson(rate(grid_s) * 0.1)
    return np.sort(np.repeat(grid_s, counts) + draw.uniform(0, 0.1, int(counts.sum())))


def _csv_seconds(path: Path, lines: Iterable[str]) -> Iterator[float]:
    rows = csv.reader(lines)
    header = [name.strip().lower() for name in next(rows, [])]
    name = next((name for name in ("seconds", "timestamp") if name in header), None)
    if name is None:
        raise _bad(path, 1, f"columns {shown(', '.join(header))}")
    column = header.index(name)
    parse: Callable[[str], float] = float if name == "seconds" else _moment_s
    for number, row in enumerate(rows, 2):
        if not row:
            continue
        try:
            yield parse(row[column].strip())
        except (ValueError, IndexError):
            raise _bad(path, number, shown(",".join(row))) from None


def _jsonl_seconds(path: Path, lines: Iterable[str]) -> Iterator[float]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record: Any = json.loads(line)
            yield float(record["timestamp"]) / 1000
        except (ValueError, KeyError, TypeError):
            raise _bad(path, number, shown(line.strip())) from None


def _moment_s(text: str) -> float:
    """Seconds of a date and time; what has no zone is taken as UTC. Digits below a microsecond are cut."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return float(text)
    if moment.tzinfo is None:
        moment = datetime.fromisoformat(text + "+00:00")
    return moment.timestamp()


def _bad(path: Path, line: int, got: str) -> BadInput:
    where = f" (line {line})" if line else ""
    return BadInput(
        f"'{path.name}' is not a trace of requests{where}",
        got=got,
        allowed=_ALLOWED,
        fix="one request a line, with the time at which it came",
    )
