"""`tandem keys`: who may ask a service, and how much."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cluster import output
from cluster.commands.options import DEFAULT_STORE, JsonOption, StoreOption, existing_store

if TYPE_CHECKING:
    from cluster.keys import Keys, Limits

RateOption = Annotated[float | None, typer.Option("--requests-per-s", help="Requests a second, at most.")]
BurstOption = Annotated[int | None, typer.Option("--burst", help="Requests at once after a pause.")]
InFlightOption = Annotated[int | None, typer.Option("--max-in-flight", help="Requests at the same time.")]

keys_app = typer.Typer(help="API keys of a store's services.", invoke_without_command=True)


@keys_app.callback()
def keys(context: typer.Context, store: StoreOption = DEFAULT_STORE, json_output: JsonOption = False) -> None:
    """List tenants, their limits and the ids of their keys."""
    if context.invoked_subcommand is not None:
        return
    tenants = _keys(store).tenants()
    if json_output:
        for tenant in tenants:
            ids = [{"id": key.id, "made_at": key.made_at} for key in tenant.keys]
            output.emit({"tenant": tenant.name, "keys": ids, "limits": tenant.limits})
        return
    rows = [
        [t.name, key.id, f"{key.made_at:%Y-%m-%d %H:%M:%S}", _words(t.limits)]
        for t in tenants
        for key in t.keys
    ]
    output.show_table(["tenant", "key", "made at", "limits"], rows)


@keys_app.command()
def create(
    tenant: str,
    requests_per_s: RateOption = None,
    burst: BurstOption = None,
    max_in_flight: InFlightOption = None,
    store: StoreOption = DEFAULT_STORE,
    json_output: JsonOption = False,
) -> None:
    """Make a key for a tenant and print it; it can't be read again."""
    from cluster.keys import parse_limits

    made = _keys(store).create(tenant, parse_limits(requests_per_s, burst, max_in_flight))
    _show({"tenant": made.tenant, "id": made.id, "key": made.text}, json_output)


@keys_app.command()
def limit(
    tenant: str,
    requests_per_s: RateOption = None,
    burst: BurstOption = None,
    max_in_flight: InFlightOption = None,
    store: StoreOption = DEFAULT_STORE,
    json_output: JsonOption = False,
) -> None:
    """Replace a tenant's limits; one that isn't given is lifted."""
    from cluster.keys import Limits, parse_limits

    limits = parse_limits(requests_per_s, burst, max_in_flight) or Limits()
    _keys(store).limit(tenant, limits)
    _show({"tenant": tenant, "limits": limits if json_output else _words(limits)}, json_output)


@keys_app.command()
def revoke(key_id: str, store: StoreOption = DEFAULT_STORE, json_output: JsonOption = False) -> None:
    """Make a key worthless; replicas hear of it within seconds."""
    _show({"tenant": _keys(store).revoke(key_id), "revoked": key_id}, json_output)


def _keys(store: str) -> Keys:
    from cluster.keys import Keys

    return Keys(existing_store(store))


def _show(facts: dict[str, object], json_output: bool) -> None:
    if json_output:
        output.emit(facts)
    else:
        output.show_facts(facts)


def _words(limits: Limits) -> str:
    told = {
        "requests/s": limits.requests_per_s,
        "at once": limits.burst,
        "in flight": limits.max_in_flight,
    }
    return ", ".join(f"{value:g} {name}" for name, value in told.items() if value is not None) or "none"
