"""`tandem train`, `submit`, `logs`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster import output, own_job
from cluster.commands.foreground import ends_with_its_ray
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
    from cluster.runs import RunResult

FOLLOW_EVERY_S = 2.0
_GATE_REFUSED = 3


def train(
    recipe: YamlArgument,
    overrides: OverridesArgument = None,
    address: AddressOption = None,
    run: RunOption = None,
    take_over: Annotated[
        bool, typer.Option("--take-over", help="Continue the run even if another process drives it.")
    ] = False,
    run_of_job: Annotated[
        bool, typer.Option("--run-of-job", help="In a Ray job, without --run: the run is called as the job.")
    ] = False,
    as_job: Annotated[
        bool,
        typer.Option(
            "--as-job",
            help="As --run-of-job; and where trying again can't help (exit 2 or 3), the job is stopped"
            " instead of failing.",
        ),
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Train a recipe: commit, gate, register, promote. Exit 3 if the gate refused."""
    from cluster.config import load_yaml
    from training.progress import display
    from training.recipe import Recipe
    from training.run import train as train_recipe

    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does, for a task that lies beside the recipe
    job_id = own_job.own_job_id(own_job.environment()) if as_job or run_of_job else None
    with own_job.final_stops_job(job_id if as_job else None):
        wanted = load_yaml(Recipe, recipe, _with_run(overrides, run))
        if job_id is not None and run is None:
            wanted = wanted.model_copy(update={"run": own_job.run_of_job(job_id)})
        with display() as show, ends_with_its_ray():
            result = train_recipe(wanted, address=address, show=show, take_over=take_over)
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
