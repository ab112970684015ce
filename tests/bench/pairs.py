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
        }


@dataclass
class Report:
    """What one benchmark found."""

    title: str
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    comparisons: list[Comparison] = field(default_factory=list)
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
        console.print(table)
        for note in self.notes:
            console.print(f"  - {note}", highlight=False, markup=False)

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        document = {
            "title": self.title,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "comparisons": [comparison.as_json() for comparison in self.comparisons],
            "notes": self.notes,
        }
        path.write_text(json.dumps(document, indent=1) + "\n")


def _cells(comparison: Comparison) -> Sequence[str]:
    ratios = comparison.ratios
    middle = median(ratios)
    aim = "" if comparison.aim is None else f"≥ {comparison.aim:g} {'✓' if middle >= comparison.aim else '✗'}"
    return (
        comparison.figure,
        comparison.ours,
        comparison.peer,
        f"{median(ours for ours, _ in comparison.values):,.1f}",
        f"{median(peer for _, peer in comparison.values):,.1f}",
        f"{middle:.3g} ({min(ratios):.3g} to {max(ratios):.3g})",
        str(len(ratios)),
        aim,
    )
