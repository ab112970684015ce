"""`tandem simulate`: a trace of requests replayed against scaling policies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cluster import output
from cluster.commands.options import JsonOption

if TYPE_CHECKING:
    from collections.abc import Mapping

    from serving.simulator.compare import Comparison
    from serving.simulator.measure import Measured
    from serving.simulator.replicas import Kind
    from serving.simulator.traces import Times
    from serving.simulator.world import Result, Setting

_WIDTH = 100
_PANEL = "The replica"


def simulate(
    trace: Annotated[
        str,
        typer.Argument(
            metavar="TRACE",
            help="CSV or JSONL with times; or diurnal, bursts, from-zero.",
            show_default=False,
        ),
    ],
    service: Annotated[
        Path | None, typer.Option(help="A service's YAML: bounds, SLO and largest batch are read from it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Which of the service's models.")] = None,
    latency: Annotated[
        str, typer.Option(help="Seconds of a batch, and of each row more: BASE,ROW.", rich_help_panel=_PANEL)
    ] = "0.1,0.01",
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="URL|SERVICE",
            help="Measure a service that runs, or a service's YAML, which is started for it: then its bounds,"
            " SLO, largest batch and cold start count.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    watch: Annotated[
        bool,
        typer.Option(
            "--watch", help="With --calibrate URL: send nothing, watch for 20 s.", rich_help_panel=_PANEL
        ),
    ] = False,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME:base=S,row=S,...",
            help="Twice, for two kinds of replica: each alone and both are compared. Besides base and"
            " row: cold=S, cost=N, batch=N, slots=N, min=N, max=N.",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=65536, rich_help_panel=_PANEL)] = 16,
    slots: Annotated[int, typer.Option(min=1, max=64, rich_help_panel=_PANEL)] = 1,
    cold_start_s: Annotated[float, typer.Option(min=0.01, max=3600, rich_help_panel=_PANEL)] = 10.0,
    cost_per_hour: Annotated[
        float, typer.Option(min=0, help="Of one replica.", rich_help_panel=_PANEL)
    ] = 1.0,
    slo_ms: Annotated[float, typer.Option(min=1)] = 1000.0,
    least: Annotated[int, typer.Option("--min", min=0, help="Replicas at least.")] = 1,
    most: Annotated[int, typer.Option("--max", min=1, max=100_000, help="Replicas at most.")] = 1000,
    policy: Annotated[str, typer.Option(help="Policies to compare, by commas.")] = "ours,serve,knative",
    scale: Annotated[float, typer.Option(min=0.001, help="Times as many requests, in the same time.")] = 1.0,
    rate: Annotated[float, typer.Option(min=0.001, help="Requests a second of a made-up trace.")] = 20.0,
    duration_s: Annotated[float, typer.Option(min=10, max=864_000, help="Of a made-up trace.")] = 3600.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    json_output: JsonOption = False,
) -> None:
    """Replay a trace of requests against scaling policies: violations, replica-seconds, cost, a picture."""
    from serving.simulator.compare import Comparison, compare
    from serving.simulator.replicas import Kind
    from serving.simulator.world import Setting

    if kind:
        setting, compared = _mixed(kind, slo_ms, seed, _times(trace, rate, duration_s, scale, seed))
        _tell(Comparison(compared), setting, json_output)
        return
    if calibrate and "://" not in calibrate and Path(calibrate).is_file():
        service = Path(calibrate)
    if service is not None:
        served = _served(service, model)
        least, most = served.replicas.min, served.replicas.max
        slo_ms, max_batch = served.slo_ms, served.max_batch_size
    base_s, row_s = _latency(latency)
    if calibrate and watch:
        base_s, row_s = _watched(calibrate)
    elif calibrate:
        found = _measured(calibrate, model, max_batch)
        base_s, row_s, cold_start_s = found.base_s, found.row_s, found.cold_start_s or cold_start_s
    one = Kind(base_s, row_s, max_batch, slots, cold_start_s, cost_per_hour=cost_per_hour)
    _check(one, slo_ms / 1000, least, most)
    setting = Setting((one,), ((least, most),), slo_ms / 1000, seed)
    names = _policies(policy, setting)
    times_s = _times(trace, rate, duration_s, scale, seed)
    _tell(compare(setting, times_s, names), setting, json_output)


def _tell(compared: Comparison, setting: Setting, json_output: bool) -> None:
    if json_output:
        for name, result in compared.results.items():
            output.emit({"policy": name, **_figures(result)})
        return
    _show(compared, setting)


def _mixed(
    kinds: list[str], slo_ms: float, seed: int, times_s: Times
) -> tuple[Setting, Mapping[str, Result]]:
    """Two kinds of replica, each alone and together."""
    from cluster.errors import BadInput, shown
    from serving.simulator.mixed import compare_kinds, parse_kind
    from serving.simulator.world import Setting

    told = [parse_kind(text) for text in kinds]
    names = [name for name, _, _ in told]
    if len(set(names)) != 2 or len(told) != 2:
        raise BadInput(
            "two kinds are compared", got=shown(", ".join(names)), allowed="--kind twice, of two names"
        )
    for _, one, (least, most) in told:
        _check(one, slo_ms / 1000, least, most)
    setting = Setting(tuple(one for _, one, _ in told), tuple(b for _, _, b in told), slo_ms / 1000, seed)
    return setting, compare_kinds(setting, names, times_s)


def _times(trace: str, rate: float, duration_s: float, scale: float, seed: int) -> Times:
    from serving.simulator.traces import SYNTHETIC, read_trace, scaled

    made = SYNTHETIC.get(trace)
    return made(rate * scale, duration_s, seed) if made else scaled(read_trace(Path(trace)), scale, seed)


def _latency(text: str) -> tuple[float, float]:
    from cluster.errors import BadInput, shown

    try:
        base_s, row_s = (float(part) for part in text.split(","))
        if not (math.isfinite(base_s + row_s) and base_s >= 0 and row_s >= 0 and base_s + row_s > 0):
            raise ValueError
    except ValueError:
        raise BadInput(
            "not a latency",
            got=shown(text),
            allowed="BASE,ROW in seconds, neither below 0, not both 0",
            fix="0.05,0.001: a batch of n rows takes 50 ms and 1 ms for each row",
        ) from None
    return base_s, row_s


def _measured(where: str, model: str | None, max_batch: int) -> Measured:
    from serving.simulator.measure import measure, measure_service

    if "://" not in where and Path(where).is_file():
        from cluster.config import load_yaml
        from serving.service import Service

        output.say("starting the service to measure one replica of it: about a minute")
        found = measure_service(load_yaml(Service, Path(where), []), _served(Path(where), model))
    else:
        output.say(f"sending {where} requests for half a minute")
        found = measure(where, model, max_batch=max_batch)
    output.say(
        f"a batch of n rows takes {found.base_s:.4g} s + {found.row_s:.4g} s * n; an answer"
        f" {found.beside_s:.3g} s more; two full batches in flight: {found.answered_rows_s:.1f} rows/s"
    )
    if found.cold_start_s is not None:
        output.say(f"the first answer from no replica came after {found.cold_start_s:.1f} s")
    return found


def _watched(url: str) -> tuple[float, float]:
    from serving.simulator.calibrate import watch

    output.say(f"watching {url} for 20 s; send it requests meanwhile, at several rates")
    base_s, row_s = watch(url)
    output.say(f"a batch of n rows takes {base_s:.4g} s + {row_s:.4g} s * n")
    return base_s, row_s


def _served(file: Path, model: str | None) -> Any:
    from cluster.config import load_yaml
    from cluster.errors import NotFound
    from serving.service import Service

    service = load_yaml(Service, file, [])
    models = service.models
    for served in models:
        if model in (None, served.ref.model):
            shared = {"replicas": service.pool.replicas} if service.pool and served.pooled else {}
            return served.model_copy(update=shared)
    raise NotFound(f"the service has no model '{model}'", allowed=", ".join(s.ref.model for s in models))


def _check(kind: Kind, slo_s: float, least: int, most: int) -> None:
    from cluster.errors import BadInput

    if kind.batch_s(1) > slo_s:
        raise BadInput(
            "no replica can hold the SLO",
            got=f"{kind.batch_s(1) * 1000:g} ms for one row",
            allowed=f"at most the SLO, {slo_s * 1000:g} ms",
            fix="say a longer --slo-ms, or another --latency",
        )
    if least > most:
        raise BadInput(
            "more replicas at least than at most", got=f"--min {least}", allowed=f"at most --max {most}"
        )


def _policies(text: str, setting: Setting) -> tuple[str, ...]:
    from cluster.errors import NotFound, shown
    from serving.simulator.compare import policies

    names, known = tuple(part.strip() for part in text.split(",")), policies(setting)
    for name in names:
        if name not in known:
            raise NotFound("no such policy", got=shown(name), allowed=", ".join(known))
    return names


def _figures(result: Result) -> dict[str, Any]:
    p50_s, p99_s = result.latency_s
    return {
        "requests": result.requests,
        "violations": result.violations,
        "violation_share": result.violation_share,
        "replica_s": sum(result.replica_s),
        "replica_s_by_kind": list(result.replica_s),
        "mean_replicas": result.mean_replicas,
        "max_replicas": result.max_replicas,
        "cost": result.cost,
        "p50_s": p50_s,
        "p99_s": p99_s,
    }


def _show(compared: Comparison, setting: Setting) -> None:
    slo_ms = setting.slo_s * 1000
    first = next(iter(compared.results))
    rows = []
    for name, result in compared.results.items():
        violations, replica_s = compared.ratios(first, name)
        rows.append(
            (
                name,
                f"{result.requests:,}",
                f"{result.violations:,} ({result.violation_share:.3%})",
                " + ".join(f"{one:,.0f}" for one in result.replica_s),
                f"{result.mean_replicas:.1f}",
                f"{result.max_replicas:,}",
                f"{result.cost:,.2f}",
                f"{result.latency_s[1] * 1000:,.0f}",
                "" if name == first else f"{violations:.2f}",
                "" if name == first else f"{replica_s:.2f}",
            )
        )
    output.show_table(
        (
            "policy",
            "requests",
            f"over {slo_ms:g} ms",
            "replica-s",
            "mean",
            "max",
            "cost",
            "p99 ms",
            f"violations {first}/it",
            "replica-s",
        ),
        rows,
    )
    capacities = ", ".join(f"{kind.capacity_s(setting.slo_s):.1f}" for kind in setting.kinds)
    output.tell(f"\nrequests a second (one replica can do {capacities}), over seconds")
    _draw([(at, came) for at, came, _, _ in compared.results[first].points])
    for name, result in compared.results.items():
        output.tell(f"\n{name}: replicas")
        _draw([(at, float(replicas)) for at, _, replicas, _ in result.points])


def _draw(points: list[tuple[float, float]]) -> None:
    import sys

    from cluster.chart import curve

    encoding = (sys.stdout.encoding or "").lower()
    for line in curve(points, width=_WIDTH, height=5, plain=not encoding.startswith("utf")):
        output.tell(line)
