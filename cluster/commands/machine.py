"""`tandem up`, `down`, `status`, `version`: what Tandem runs on this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster import output
from cluster.commands.options import JsonOption

if TYPE_CHECKING:
    from cluster.local import LocalRay


def up(
    dashboard: Annotated[
        bool, typer.Option("--dashboard", help="With the dashboard and the jobs API.")
    ] = False,
    cpus: Annotated[int | None, typer.Option(min=1, help="How many to offer; without it, all.")] = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="How many to offer; without it, all.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Start a Ray on this machine that stays until `tandem down`."""
    from cluster.local import LocalRay

    local = LocalRay.start(num_cpus=cpus, num_gpus=gpus, dashboard=dashboard, tied=False, purpose="tandem up")
    if json_output:
        output.emit(_summary(local))
        return
    output.show_facts({"address": local.address, "dashboard": local.dashboard_url})
    output.tell("\nTandem's commands find its token themselves. For Ray's own:")
    for name, value in local.env.items():
        output.tell(f"  export {name}={value}")


def down(json_output: JsonOption = False) -> None:
    """Stop every Ray that Tandem started here as this user, and nothing else."""
    from cluster.local import stop_all

    stopped = stop_all()
    if json_output:
        output.emit({"stopped": [local.record.id for local in stopped]})
    elif not stopped:
        output.tell("nothing was running")
    for local in stopped if not json_output else []:
        output.tell(f"stopped {local.record.purpose} ({local.record.address or 'was starting'})")


def status(json_output: JsonOption = False) -> None:
    """List what Tandem has started on this machine."""
    from cluster.local import running

    found = [_summary(local) for local in running()]
    if json_output:
        for summary in found:
            output.emit(summary)
        return
    output.show_table(
        ["what", "state", "address", "dashboard", "since", "notes"],
        [
            [
                s["purpose"],
                s["state"],
                s["address"],
                s["dashboard"],
                s["since"][:19],
                "  ".join(f"{name} {value}" for name, value in s["notes"].items()),
            ]
            for s in found
        ],
    )


def version(json_output: JsonOption = False) -> None:
    """Print the releases of Tandem and of what it stands on."""
    import platform
    from importlib.metadata import version as release_of

    releases = {name: release_of(name) for name in ("tandem-ray", "ray", "torch", "onnxruntime")}
    releases["python"] = platform.python_version()
    output.emit(releases) if json_output else output.show_facts(releases)


def _summary(local: LocalRay) -> dict[str, Any]:
    record = local.record
    return {
        "id": record.id,
        "purpose": record.purpose,
        "state": ("up" if record.address else "starting") if local.alive or not record.address else "dead",
        "address": record.address,
        "dashboard": record.dashboard_url,
        "since": record.created_at.isoformat(),
        "notes": record.notes,
    }
