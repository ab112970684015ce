"""The command line that every question of the training benchmark has, and how each ends."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from tests.bench.pairs import PAIRS, Report

WIDTH_CHARS = 160


def asked(doc: str | None, **more: tuple[type, object, str]) -> argparse.Namespace:
    """`--pairs`, `--out`, and what else: name=(type, default, help)."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    for name, (kind, default, text) in more.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=text)
    return parser.parse_args()


def finished(report: Report, chosen: argparse.Namespace) -> int:
    """Print the report, write it where asked; give the exit code."""
    report.show(Console(width=WIDTH_CHARS))
    if chosen.out:
        report.write(chosen.out)
    return 0
