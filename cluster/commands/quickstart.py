"""`tandem quickstart`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from cluster import output
from cluster.commands.options import JsonOption


def quickstart(
    folder: Annotated[Path, typer.Option(help="Where its data, store and logs go.")] = Path(
        ".tandem/quickstart"
    ),
    keep: Annotated[bool, typer.Option("--keep", help="Leave it serving; `tandem down` ends it.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Train handwritten digits with two workers, serve them, and measure: the whole path once."""
    from cluster.quickstart import quickstart as run_quickstart

    folder.mkdir(parents=True, exist_ok=True)
    report = run_quickstart(folder.resolve(), keep=keep)
    if json_output:
        output.emit(asdict(report))
        return
    rows = report.mean_batch_rows
    output.show_facts(
        {
            "version": report.version,
            "accuracy over HTTP": f"{report.accuracy_over_http:.4f}",
            "requests": f"{report.requests:,}, {report.failed} failed",
            "requests/s": f"{report.requests_per_s:,.0f}",
            "p50": f"{report.p50_ms:.1f} ms",
            "p99": f"{report.p99_ms:.1f} ms",
            "mean batch": "not known" if rows is None else f"{rows:.1f} rows",
            "training": f"{report.training_samples_per_s:,.0f} samples/s",
            "commit to first answer": f"{report.commit_to_first_answer_s:.2f} s",
        }
    )
    if keep:
        output.tell(f"\nIt goes on serving; `tandem down` ends it. Ask it yourself:\n{report.curl}")
    else:
        output.tell(f"\nIt has stopped; with --keep it goes on serving, and answers this:\n{report.curl}")
