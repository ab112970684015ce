"""`tandem train`, `submit`, `runs`, `logs`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster import output
from cluster.commands.options import (
    DEFAULT_STORE,
    AddressOption,
    JsonOption,
    OverridesArgument,
    RunOption,
    StoreOption,
    YamlArgument,
    existing_store,
)

if TYPE_CHECKING:
    from cluster.runs import Run, RunResult

FOLLOW_EVERY_S = 2.0
_GATE_REFUSED = 3

runs_app = typer.Typer(help="Runs in a store.", invoke_without_command=True)


def train(
    recipe: YamlArgument,
    overrides: OverridesArgument = None,
    address: AddressOption = None,
    run: RunOption = None,
    json_output: JsonOption = False,
) -> None:
    """Train a recipe: commit, gate, register, promote. Exit 3 if the gate refused."""
    from cluster.config import load_yaml
    from training.progress import display
    from training.recipe import Recipe
    from training.run import train as train_recipe

    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does, for a task that lies beside the recipe
    wanted = load_yaml(Recipe, recipe, _with_run(overrides, run))
    with display() as show:
        result = train_recipe(wanted, address=address, show=show)
    if json_output:
        output.emit(result)
    else:
        output.show_facts(_facts(result))
    if result.gate == "failed":
        raise typer.Exit(_GATE_REFUSED)


def submit(
    recipe: YamlArgument,
    overrides: OverridesArgument = None,
    address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_API_SERVER_ADDRESS",
            help="http://HOST:8265 of the cluster's dashboard; without it, what `tandem up` started.",
        ),
    ] = None,
    run: RunOption = None,
    package: Annotated[
        Path | None, typer.Option(help="A folder with a task of your own, sent along.", file_okay=False)
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", "--follow", help="Show the job's output and end as it ends.")
    ] = False,
    tandem: Annotated[str, typer.Option(help="The command on the cluster.")] = "tandem",
    json_output: JsonOption = False,
) -> None:
    """Send a recipe to a Ray cluster as a job."""
    from cluster.config import load_yaml
    from cluster.jobs import Jobs, dashboard_url, is_loopback
    from cluster.runs import new_run_name
    from training.recipe import Recipe

    wanted = load_yaml(Recipe, recipe, _with_run(overrides, run))
    url = dashboard_url(address or _own_dashboard())
    if not is_loopback(url):
        _warn_of_folders(wanted.store, wanted.data.train, wanted.data.eval)
    name = wanted.run or new_run_name(wanted.model)
    jobs = Jobs(url)
    job = jobs.submit(wanted.model_dump(mode="json"), run=name, package=package, tandem=tandem)
    facts: dict[str, Any] = {"job": job.job_id, "run": job.run, "model": wanted.model, "address": job.address}
    if not wait:
        _print_job(facts, json_output)
        return
    output.say(f"job {job.job_id}, run {job.run}")
    ended = jobs.follow(job.job_id, lambda lines: output.say(lines.rstrip("\n")))
    facts |= {"status": ended.status, "exit_code": ended.exit_code}
    _print_job(facts, json_output)
    if ended.status != "SUCCEEDED":
        raise typer.Exit(ended.exit_code or 1)


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


def logs(
    run: str,
    store: StoreOption = DEFAULT_STORE,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the run ends.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Show what happened in a run."""
    from cluster.events import read_events
    from cluster.runs import Run

    opened = existing_store(store)
    watched = Run(opened, run)
    watched.record()
    seen: set[str] = set()
    while True:
        ended = watched.result() is not None
        for event in read_events(opened, watched.prefix, seen):
            output.emit(event) if json_output else output.tell(_event_line(event))
        if ended or not follow:
            return
        time.sleep(FOLLOW_EVERY_S)


def _with_run(overrides: list[str] | None, run: str | None) -> list[str]:
    # In quotes: a run called 2026 is a name, not a number.
    return [*(overrides or []), *([f"run={json.dumps(run)}"] if run is not None else [])]


def _facts(result: RunResult) -> dict[str, object]:
    return {
        "run": result.run,
        "model": result.model,
        "version": result.version if result.version is not None else "none: the gate refused",
        "metrics": output.metrics_text(result.metrics) or None,
        "steps": result.steps,
        "samples/s": f"{result.samples_per_s:,.0f}",
        "store": result.store,
    }


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

    checkpoints = run.checkpoints()
    newest = checkpoints.head()
    if newest == 0:
        return None
    try:
        return int(checkpoints.read(newest).meta["step"])
    except (Damaged, KeyError):
        return None


def _event_line(event: dict[str, Any]) -> str:
    rest = "  ".join(f"{key}={value}" for key, value in event.items() if key not in ("at", "event"))
    return f"{str(event.get('at', ''))[:23]}  {event.get('event', ''):<20}  {rest}"


def _own_dashboard() -> str:
    from cluster.errors import BadInput
    from cluster.local import running

    urls = [local.dashboard_url for local in running() if local.alive and local.dashboard_url]
    if len(urls) == 1 and urls[0] is not None:
        return urls[0]
    raise BadInput(
        "no cluster to send the job to",
        got=f"{len(urls)} local ones with a dashboard",
        allowed="--address http://HOST:8265",
        fix="name the cluster, or start one here: tandem up --dashboard",
    )


def _warn_of_folders(*uris: str) -> None:
    if folders := [uri for uri in uris if uri.startswith("file://")]:
        output.say(f"note: {folders[0]} is a folder; every node of the cluster must have it at this path")


def _print_job(facts: dict[str, Any], json_output: bool) -> None:
    if json_output:
        output.emit(facts)
    else:
        output.show_facts(facts)
