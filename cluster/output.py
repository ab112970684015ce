"""What commands print: results on stdout, everything else on stderr.

With `--json`, stdout holds one JSON object a line and nothing else.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from cluster.errors import TandemError

_PLAIN_WIDTH = 200


def emit(data: object) -> None:
    """Print `data` (plain values, pydantic models, dataclasses, datetimes) as one line of JSON."""
    line = orjson.dumps(data, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)
    sys.stdout.write(line.decode() + "\n")
    sys.stdout.flush()


def say(text: str) -> None:
    """Print a line for a person on stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def tell(text: str) -> None:
    """Print a line of a result, for a person, on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def show_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on stdout; piped, it is as wide as it needs to be."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    Console(file=sys.stdout, width=width, highlight=False).print(table)


def show_facts(facts: Mapping[str, object]) -> None:
    """Print names and values on stdout, aligned, one a line; those that are None are left out."""
    shown = {name: value for name, value in facts.items() if value is not None}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        tell(f"{name:<{width}}  {value}")


def metrics_text(metrics: Mapping[str, float]) -> str:
    """Metrics as one short text."""
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def show_error(error: TandemError) -> None:
    """Print the four parts on stderr, aligned; with TANDEM_DEBUG=1 the traceback before them."""
    if os.environ.get("TANDEM_DEBUG") == "1":
        traceback.print_exception(error)
    parts = error.parts()
    for name, text in parts.items():
        label = "error:" if name == "failed" else name + ":"
        say(f"{label:<9}{text}")


def show_bug(error: Exception) -> None:
    """Print an exception that nobody foresaw, with its traceback."""
    traceback.print_exception(error)
    say(f"error:   {type(error).__name__}: {error}")
    say("fix:     this is a fault of Tandem's: please report it with the lines above")


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    raise TypeError(f"{type(value).__name__} is not JSON")
