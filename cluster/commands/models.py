"""`tandem models`: what there is, what is live, promote and rollback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster import output
from cluster.commands.options import DEFAULT_STORE, JsonOption, StoreOption, existing_store

if TYPE_CHECKING:
    from cluster.registry import Entry, Registry

AliasOption = Annotated[str, typer.Option("--alias", help="The alias to move.")]
WhyOption = Annotated[str, typer.Option("--why", help="For the model's history.")]

models_app = typer.Typer(help="Models in a store.", invoke_without_command=True)


@models_app.callback()
def models(
    context: typer.Context, store: StoreOption = DEFAULT_STORE, json_output: JsonOption = False
) -> None:
    """List the models in a store."""
    if context.invoked_subcommand is not None:
        return
    registry = _registry(store)
    found = [newest for name in registry.models() if (newest := registry.newest(name)) is not None]
    if json_output:
        for newest in found:
            output.emit({"model": newest.model, "versions": newest.versions, "aliases": _aliases(newest)})
        return
    rows = [[newest.model, newest.versions, _aliases_text(newest)] for newest in found]
    output.show_table(["model", "versions", "aliases"], rows)


@models_app.command()
def show(model: str, store: StoreOption = DEFAULT_STORE, json_output: JsonOption = False) -> None:
    """Show a model's versions, its aliases and its history."""
    history = _registry(store).history(model)
    newest = history[-1]
    versions = [entry.version for entry in history if entry.action == "register"]
    if json_output:
        output.emit({"model": model, "aliases": _aliases(newest), "versions": versions, "history": history})
        return
    names: dict[int, list[str]] = {}
    for alias, target in sorted(newest.aliases.items()):
        names.setdefault(target.version, []).append(alias)
        if target.trial is not None:
            told = f"{target.trial.mode} of {alias} ({target.trial.percent:g}%)"
            names.setdefault(target.trial.version, []).append(told)
    output.show_table(
        ["version", "aliases", "run", "metrics"],
        [
            [v.version, ", ".join(names.get(v.version, [])), v.run, output.metrics_text(v.metrics)]
            for v in versions
        ],
    )
    output.tell("")
    output.show_table(
        ["entry", "at", "who", "what", "why"],
        [[e.number, f"{e.at:%Y-%m-%d %H:%M:%S}", e.who, _what(e), e.why] for e in history],
    )


@models_app.command()
def promote(
    model: str,
    version: int,
    alias: AliasOption = "live",
    why: WhyOption = "",
    store: StoreOption = DEFAULT_STORE,
    json_output: JsonOption = False,
) -> None:
    """Point an alias at a version; replicas that serve the alias follow within seconds."""
    _moved(_registry(store).promote(model, alias, version, why=why), json_output)


@models_app.command()
def rollback(
    model: str,
    alias: AliasOption = "live",
    why: WhyOption = "",
    store: StoreOption = DEFAULT_STORE,
    json_output: JsonOption = False,
) -> None:
    """Point an alias back at the version it stood at before."""
    _moved(_registry(store).rollback(model, alias, why=why), json_output)


def _registry(store: str) -> Registry:
    from cluster.registry import Registry

    return Registry(existing_store(store))


def _aliases(entry: Entry) -> dict[str, int]:
    return {alias: target.version for alias, target in sorted(entry.aliases.items())}


def _aliases_text(entry: Entry) -> str:
    return ", ".join(f"{alias} -> {version}" for alias, version in _aliases(entry).items())


def _what(entry: Entry) -> str:
    if entry.action == "register":
        return f"register version {entry.version.version}"
    if entry.action in ("canary", "shadow", "advance"):
        trial = entry.aliases[entry.alias or ""].trial
        share = f" {trial.percent:g}%" if trial is not None else ""
        return f"{entry.action} {entry.alias}: version {entry.version.version}{share}"
    return f"{entry.action} {entry.alias} -> {entry.version.version}"


def _moved(entry: Entry, json_output: bool) -> None:
    facts: dict[str, Any] = {
        "model": entry.model,
        "alias": entry.alias,
        "version": entry.version.version,
        "entry": entry.number,
    }
    if json_output:
        output.emit(facts)
    else:
        output.tell(f"{entry.model}@{entry.alias} is version {entry.version.version}")
