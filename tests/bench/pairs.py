"""Paired comparisons: ours and a peer's in turn, the order turned round each time, a ratio a pair.

Speeds on a shared machine drift by more than what is to be seen, so nothing here is an absolute
claim: a figure is the median of the ratios of neighbours in time, with the lowest and the highest.
Knows nothing of what is measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

A = TypeVar("A")
B = TypeVar("B")

PAIRS = 5


def in_turn(ours: Callable[[], A], peer: Callable[[], B], pairs: int) -> list[tuple[A, B]]:
    """Measure both `pairs` times: ours first, then the peer first, and so on."""
    results: list[tuple[A, B]] = []
    for number in range(pairs):
        if number % 2 == 0:
            first = ours()
            results.append((first, peer()))
        else:
            second = peer()
            results.append((ours(), second))
    return results


@dataclass(frozen=True)
class Comparison:
    """One figure of ours beside one of a peer's. A ratio is ours divided by the peer's."""

    figure: str
    """What was measured, with its unit."""
    ours: str
    peer: str
    values: tuple[tuple[float, float], ...]
    """(ours, peer's) of each pair."""
    aim: float | None = None
    """The ratio aimed at, at least."""
    at_most: float | None = None
    """The ratio aimed at, at most: for figures of which less is better."""

    @property
    def ratios(self) -> list[float]:
        """Of each pair, in the order measured. A peer that gave nothing is passed infinitely."""
        return [ours / peer if peer else float("inf") for ours, peer in self.values]

    def as_json(self) -> dict[str, Any]:
        """All of it, raw values included."""
        return {
            "figure": self.figure,
            "ours": self.ours,
            "peer": self.peer,
            "values": self.values,
            "ratio": {"median": median(self.ratios), "min": min(self.ratios), "max": max(self.ratios)},
            "pairs": len(self.values),
            "aim": self.aim,
            "at_most": self.at_most,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Comparison:
        """What `as_json` gave."""
        fields = {name: document.get(name) for name in ("figure", "ours", "peer", "aim", "at_most")}
        values = tuple((float(ours), float(peer)) for ours, peer in document["values"])
        return cls(values=values, **fields)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Measure:
    """One figure that stands for itself."""

    figure: str
    """What was measured, with its unit."""
    values: tuple[float, ...]
    at_most: float | None = None
    """What is aimed at."""

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        return {"figure": self.figure, "values": self.values, "at_most": self.at_most}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Measure:
        """What `as_json` gave."""
        return cls(document["figure"], tuple(document["values"]), document["at_most"])


@dataclass
class Report:
    """What one benchmark found."""

    title: str
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    comparisons: list[Comparison] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What was left out and why, and what a reader must know."""

    def show(self, console: Console) -> None:
        """Print facts, table and notes."""
        console.print(f"\n[bold]{self.title}[/bold]")
        for name, value in {**self.machine, **self.versions}.items():
            console.print(f"  {name + ':':<14} {value}", highlight=False)
        table = Table("figure", "ours", "peer", "ours (median)", "peer (median)")
        table.add_column("ratio: median (min to max)", justify="right")
        table.add_column("pairs", justify="right")
        table.add_column("aim", justify="right")
        for comparison in self.comparisons:
            table.add_row(*_cells(comparison))
        if self.comparisons:
            console.print(table)
        if self.measures:
            console.print(_table_of(self.measures))
        for note in self.notes:
            console.print(f"  - {note}", highlight=False, markup=False)

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        document = {
            "title": self.title,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "comparisons": [comparison.as_json() for comparison in self.comparisons],
            "measures": [measure.as_json() for measure in self.measures],
            "notes": self.notes,
        }
        path.write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """What `write` wrote."""
        document = json.loads(path.read_text())
        return cls(
            document["title"],
            document["machine"],
            document["versions"],
            [Comparison.from_json(each) for each in document["comparisons"]],
            [Measure.from_json(each) for each in document.get("measures", [])],
            document["notes"],
        )


def _cells(comparison: Comparison) -> Sequence[str]:
    ratios = comparison.ratios
    middle = median(ratios)
    return (
        comparison.figure,
        comparison.ours,
        comparison.peer,
        _number(median(ours for ours, _ in comparison.values)),
        _number(median(peer for _, peer in comparison.values)),
        f"{middle:.3g} ({min(ratios):.3g} to {max(ratios):.3g})",
        str(len(ratios)),
        _aim(middle, comparison.aim, comparison.at_most),
    )


def _table_of(measures: Sequence[Measure]) -> Table:
    table = Table("figure")
    for heading in ("median", "lowest", "highest", "times", "aim"):
        table.add_column(heading, justify="right")
    for measure in measures:
        middle = median(measure.values)
        numbers = [_number(value) for value in (middle, min(measure.values), max(measure.values))]
        table.add_row(measure.figure, *numbers, str(len(measure.values)), _aim(middle, None, measure.at_most))
    return table


def _aim(value: float, at_least: float | None, at_most: float | None) -> str:
    if at_least is not None:
        return f"≥ {at_least:g} {'✓' if value >= at_least else '✗'}"
    if at_most is not None:
        return f"≤ {at_most:g} {'✓' if value <= at_most else '✗'}"
    return ""


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:,.3g}"
