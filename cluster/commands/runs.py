"""`tandem runs`: what runs a store has, and how each goes or went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster import output
from cluster.commands.options import DEFAULT_STORE, AddressOption, JsonOption, StoreOption, existing_store

if TYPE_CHECKING:
    from cluster.runs import Run
    from training.data.audit import Audit

_ROWS_NAMED = 20
RunningStoreOption = Annotated[
    str | None,
    typer.Option("--store", help="The run's; needed where runs of one name from two stores train at once."),
]

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
    """Show one run: how far it is, how fast, where its time and money went, what went wrong."""
    from cluster.commands.show import facts_of, show
    from cluster.runs import Run

    run = Run(existing_store(store), name)
    output.emit(facts_of(run)) if json_output else show(run)


@runs_app.command("audit")
def audit_run(
    name: str,
    store: StoreOption = DEFAULT_STORE,
    checkpoint: Annotated[int | None, typer.Option(help="Its number; without it, the newest.", min=1)] = None,
    json_output: JsonOption = False,
) -> None:
    """Work out which rows a run was trained on: name any missing or repeated. Exit 1 if there are."""
    from cluster.runs import Run
    from training.data.audit import audit

    found = audit(Run(existing_store(store), name), checkpoint)
    if json_output:
        output.emit(found)
    else:
        _show_audit(found)
    if found.problems:
        raise typer.Exit(1)


def _show_audit(found: Audit) -> None:
    output.show_facts(
        {
            "run": found.run,
            "checkpoint": f"{found.checkpoint}, step {found.step:,}, row {found.cursor:,} of the order",
            "dataset": f"{found.dataset}, {found.dataset_rows:,} rows",
            "ledger": f"{found.segments} segments of {found.attempts} attempts",
        }
    )
    output.show_table(
        ["epoch", "rows due", "missing", "repeated"],
        [[e.epoch, e.due_rows, e.missing_rows, e.repeated_rows] for e in found.epochs],
    )
    for kind in ("missing", "repeated"):
        rows = [(epoch.epoch, row) for epoch in found.epochs for row in getattr(epoch, kind)]
        for epoch, row in rows[:_ROWS_NAMED]:
            output.tell(f"{kind}: epoch {epoch}, {row.file}, row group {row.group}, row {row.row}")
        if len(rows) > _ROWS_NAMED:
            output.tell(f"{kind}: and more; --json names them")
    for left_out in found.skipped:
        output.tell(
            f"skipped on purpose: epoch {left_out.epoch}, {left_out.rows:,} rows from position"
            f" {left_out.position:,}, by attempt {left_out.attempt}; --json names them"
        )
    for problem in found.problems:
        output.tell(f"problem: {problem}")
    if not found.problems:
        output.tell("every row came as often as it should")


@runs_app.command("lend")
def lend_workers(
    name: str,
    workers: Annotated[int, typer.Option(min=1, help="How many workers to do without.")] = 1,
    lent_for: Annotated[str, typer.Option("--for", help="For how long: 90s, 10m, 2h.")] = "10m",
    back: Annotated[bool, typer.Option("--back", help="Take back what is lent, now.")] = False,
    address: AddressOption = None,
    store: RunningStoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Free the resources of some of a run's workers for a while; no step is lost, and they come back."""
    from training.crew import lending

    if back:
        lending.take_back(name, address, store)
        output.tell(f"run '{name}' takes back what it lent")
        return
    lent = lending.lend(name, workers, lending.seconds(lent_for), address, store)
    if json_output:
        output.emit(lent)
        return
    output.tell(f"run '{name}' lent {workers} for {lent_for}, free after {lent['took_s']:.1f} s")


@runs_app.command("status")
def run_status(
    name: str,
    address: AddressOption = None,
    store: RunningStoreOption = None,
    json_output: JsonOption = False,
) -> None:
    """Show where a run that trains now stands: its workers, their steps, what is lent."""
    from training.crew import lending

    found = lending.status(name, address, store)
    if json_output:
        output.emit(found)
        return
    members = found.pop("members")
    output.show_facts(found)
    output.show_table(
        ["worker", "process", "pid", "node", "phase", "step"],
        [[m["rank"], who, m["pid"], m["node"][:8], m["phase"], m["step"]] for who, m in members.items()],
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
