"""`tandem runs`: what runs a store has, and how each goes or went."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import typer

from cluster import output
from cluster.commands.options import DEFAULT_STORE, JsonOption, StoreOption, existing_store

if TYPE_CHECKING:
    from cluster.runs import Run

runs_app = typer.Typer(help="Runs in a store.", invoke_without_command=True)


@runs_app.callback()
def runs(context: typer.Context, store: StoreOption = DEFAULT_STORE, json_output: JsonOption = False) -> None:
    """List the runs in a store."""
    if context.invoked_subcommand is not None:
        return
    from cluster.runs import Run, run_names

    opened = existing_store(store)
    found = [summary for name in run_names(opened) if (summary := _listed(Run(opened, name)))]
    if json_output:
        for summary in found:
            output.emit(summary)
        return
    output.show_table(
        ["run", "model", "state", "last step", "version", "metrics"],
        [
            [s["run"], s["model"], s["state"], s["step"], s["version"], output.metrics_text(s["metrics"])]
            for s in found
        ],
    )


@runs_app.command("show")
def show_run(name: str, store: StoreOption = DEFAULT_STORE, json_output: JsonOption = False) -> None:
    """Show one run: what was asked for and how it went."""
    from cluster.runs import Run

    run = Run(existing_store(store), name)
    record = run.record()
    summary = _summary(run) or {}
    if json_output:
        output.emit({**summary, "created_at": record.created_at, "recipe": record.recipe})
        return
    output.show_facts(
        {
            **{key: value for key, value in summary.items() if key != "metrics"},
            "metrics": output.metrics_text(summary["metrics"]) or None,
            "started": record.created_at.isoformat(timespec="seconds"),
            "recipe": json.dumps(record.recipe),
        }
    )


def _listed(run: Run) -> dict[str, Any] | None:
    """As `_summary`, but one damaged run must not hide the others."""
    from cluster.errors import Damaged

    try:
        return _summary(run)
    except Damaged:
        return {
            "run": run.name,
            "model": None,
            "state": "damaged",
            "step": None,
            "version": None,
            "metrics": {},
        }


def _summary(run: Run) -> dict[str, Any] | None:
    """One run, for the table and for JSON; None for a folder that no run has claimed.

    A run that died and one that goes on look the same from here.

    Raises:
        Damaged: one of its records can't be read.
    """
    from cluster.errors import NotFound

    try:
        record = run.record()
    except NotFound:
        return None
    result = run.result()
    if result is None:
        state, step = "not finished", _last_step(run)
    else:
        state, step = "committed" if result.gate == "passed" else "gate refused", result.steps
    return {
        "run": run.name,
        "model": record.model,
        "state": state,
        "step": step,
        "version": result.version if result else None,
        "metrics": result.metrics if result else {},
    }


def _last_step(run: Run) -> int | None:
    from cluster.errors import Damaged

    try:
        newest = run.checkpoints().last()
        return int(newest.meta["step"]) if newest is not None else None
    except (Damaged, KeyError):
        return None
