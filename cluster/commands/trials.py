"""`tandem models canary`, `shadow` and `abandon`: a candidate beside the version that an alias points at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster import output
from cluster.commands.models import AliasOption, WhyOption
from cluster.commands.options import DEFAULT_STORE, JsonOption, StoreOption, existing_store

if TYPE_CHECKING:
    from cluster.registry import Entry

StepsOption = Annotated[
    str, typer.Option("--steps", help="Percent of requests in each step, such as 1,10,50.")
]
HoldOption = Annotated[float, typer.Option("--hold-s", help="Seconds that a step lasts at least.")]
LeastOption = Annotated[
    int, typer.Option("--least-requests", help="Requests that the candidate must get in a step.")
]
ErrorOption = Annotated[
    float, typer.Option("--error-margin", help="How much larger its share of failures may be.")
]
LatencyOption = Annotated[
    float, typer.Option("--latency-ratio", help="How many times the other's p95 its own may be.")
]
ScoreOption = Annotated[
    float,
    typer.Option("--score-margin", help="How much lower its mean score may be."),
]
WaitOption = Annotated[bool, typer.Option("--wait", help="After the last step wait for a person.")]


def canary(
    model: str,
    version: int,
    alias: AliasOption = "live",
    steps: StepsOption = "1,10,50",
    hold_s: HoldOption = 60.0,
    least_requests: LeastOption = 200,
    error_margin: ErrorOption = 0.01,
    latency_ratio: LatencyOption = 1.25,
    score_margin: ScoreOption = 0.02,
    wait: WaitOption = False,
    why: WhyOption = "",
    store: StoreOption = DEFAULT_STORE,
    json_output: JsonOption = False,
) -> None:
    """Let a version answer a growing share of an alias's requests; it is promoted or abandoned by rule."""
    rules: dict[str, float | int | str | None] = {
        "hold_s": hold_s,
        "least_requests": least_requests,
        "error_margin": error_margin,
        "latency_ratio": latency_ratio,
        "score_margin": score_margin,
        "then": "wait" if wait else "promote",
    }
    _begin("canary", model, version, alias, steps, rules, why, store, json_output)


def shadow(
    model: str,
    version: int,
    alias: AliasOption = "live",
    percent: Annotated[float, typer.Option("--percent", help="Percent of requests that are copied.")] = 100.0,
    hold_s: HoldOption = 600.0,
    least_requests: LeastOption = 1000,
    error_margin: ErrorOption = 0.01,
    latency_ratio: LatencyOption = 1.25,
    disagreement: Annotated[
        float | None,
        typer.Option("--disagreement", help="Share of answers that may differ."),
    ] = None,
    promote: Annotated[bool, typer.Option("--promote", help="Point the alias at it when it holds.")] = False,
    why: WhyOption = "",
    store: StoreOption = DEFAULT_STORE,
    json_output: JsonOption = False,
) -> None:
    """Give a version copies of an alias's requests and compare; its answers reach nobody."""
    rules: dict[str, float | int | str | None] = {
        "hold_s": hold_s,
        "least_requests": least_requests,
        "error_margin": error_margin,
        "latency_ratio": latency_ratio,
        "disagreement": disagreement,
        "then": "promote" if promote else "wait",
    }
    _begin("shadow", model, version, alias, str(percent), rules, why, store, json_output)


def abandon(
    model: str,
    alias: AliasOption = "live",
    why: WhyOption = "",
    store: StoreOption = DEFAULT_STORE,
    json_output: JsonOption = False,
) -> None:
    """End a canary or a shadow; the alias stays where it points."""
    from cluster import trials
    from cluster.registry import Registry

    _tell(trials.abandon(Registry(existing_store(store)), model, alias, why=why), json_output)


def _begin(
    mode: Literal["canary", "shadow"],
    model: str,
    version: int,
    alias: str,
    steps: str,
    rules: dict[str, float | int | str | None],
    why: str,
    store: str,
    json_output: bool,
) -> None:
    from cluster import trials
    from cluster.registry import Registry

    entry = trials.begin(
        Registry(existing_store(store)),
        model,
        alias,
        version,
        mode=mode,
        steps=trials.parse_steps(steps),
        rules=trials.parse_rules(rules),
        why=why,
    )
    _tell(entry, json_output)


def _tell(entry: Entry, json_output: bool) -> None:
    trial = entry.aliases[entry.alias or ""].trial
    if json_output:
        output.emit({"model": entry.model, "alias": entry.alias, "entry": entry.number, "trial": trial})
    elif trial is None:
        output.tell(f"{entry.model}@{entry.alias} stays version {entry.version.version}; nothing is tried")
    else:
        share = ", ".join(f"{step:g}%" for step in trial.steps)
        output.tell(
            f"{entry.model}@{entry.alias}: version {trial.version} is tried as a {trial.mode} ({share})"
        )
