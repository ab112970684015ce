"""What `tandem runs show` prints: one run, from its records, its events and its checkpoints."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING, Any

from cluster import output
from cluster.chart import curve
from cluster.goodput import MEANING
from cluster.summary import Summary, Time, age_s, read_summary, summarise

if TYPE_CHECKING:
    from cluster.runs import Run, RunRecord, RunResult

_LIVE_S = 150.0
"""A run whose last event is younger than this goes on; its writers tell something every minute."""
_PIPED_WIDTH = 100
_MOST_FAILURES = 12


def facts_of(run: Run) -> dict[str, Any]:
    """Everything that is known of a run, fit for JSON.

    Raises:
        NotFound: there is no such run.
        Damaged: one of its records can't be read.
        StorageError: the store can't be read.
    """
    record, result = run.record(), run.result()
    summary = _summary(run)
    return {
        "run": run.name,
        "model": record.model,
        "state": _state(result, summary),
        "created_at": record.created_at,
        "step": result.steps if result else summary.step,
        "version": result.version if result else None,
        "metrics": result.metrics if result else {},
        "kept_checkpoints": kept_checkpoints(run),
        "summary": summary.model_dump(mode="json"),
        "recipe": record.recipe,
    }


def show(run: Run) -> None:
    """Print a run for a person. Raises as `facts_of`."""
    record, result = run.record(), run.result()
    summary = _summary(run)
    output.show_facts(_head(record, result, summary))
    _show_curve(summary)
    output.tell("")
    _show_time(summary.time)
    output.show_facts(_tail(run, summary))
    _show_failures(summary)


def kept_checkpoints(run: Run) -> list[int]:
    """Numbers of the checkpoints that have both a manifest and files."""
    prefix = f"{run.prefix}/checkpoints/"
    manifests: set[int] = set()
    files: set[int] = set()
    for key in run.store.keys(prefix):
        number, _, rest = key.removeprefix(prefix).partition("/")
        if number.isdecimal():
            (manifests if rest == "manifest.json" else files).add(int(number))
    return sorted(manifests & files)


def _summary(run: Run) -> Summary:
    """From the events; where there are none any more, what the last attempt has left."""
    summary = summarise(run)
    return summary if summary.last_event_at else read_summary(run) or summary


def _state(result: RunResult | None, summary: Summary) -> str:
    if result is not None:
        return "committed" if result.gate == "passed" else "gate refused"
    if summary.given_up:
        return "failed"
    age = age_s(summary)
    return "running" if age is not None and age < _LIVE_S else "not finished"


def _head(record: RunRecord, result: RunResult | None, summary: Summary) -> dict[str, object]:
    age, state = age_s(summary), _state(result, summary)
    heard = "" if age is None or result else f", last event {_duration(age)} ago"
    rate = summary.samples_per_s if result is None or summary.samples_per_s else result.samples_per_s
    return {
        "run": record.run,
        "model": record.model,
        "state": f"{state}{heard}",
        "why": summary.given_up if state == "failed" else None,
        "started": record.created_at.isoformat(timespec="seconds"),
        "steps": _steps(result.steps if result else summary.step, summary),
        "first step": None if summary.first_step_s is None else f"after {_duration(summary.first_step_s)}",
        "version": result.version if result else None,
        "metrics": output.metrics_text(result.metrics) or None if result else None,
        "workers": summary.workers,
        "samples/s": None if rate is None else f"{rate:,.0f}",
        "MFU": "not known" if summary.mfu is None else f"{summary.mfu:.1%}",
        "loss": None if summary.loss is None else f"{summary.loss:.4g}",
    }


def _steps(step: int | None, summary: Summary) -> str | None:
    if step is None:
        return None
    of = f" of {summary.total_steps:,} ({step / summary.total_steps:.0%})" if summary.total_steps else ""
    return f"{step:,}{of}" + ("" if summary.epoch is None else f", epoch {summary.epoch + 1}")


def _show_curve(summary: Summary) -> None:
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else _PIPED_WIDTH
    plain = not terminal or "utf" not in (sys.stdout.encoding or "").lower()
    for line in curve(summary.curve, width=min(width, 160), plain=plain):
        output.tell(line)


def _show_time(time: Time) -> None:
    if not time.total_s:
        output.tell("time       no account in the events")
        return
    rows: list[list[object]] = []
    for kind, seconds in time.worker_s.items():
        if seconds:
            rows.append([kind, f"{seconds:,.1f}", f"{seconds / time.total_s:.1%}", MEANING.get(kind)])
    rows.append(["in all", f"{time.total_s:,.1f}", "100.0%", f"over {_duration(time.wall_s)}"])
    columns = ["kind", "worker-seconds", "share", "what"]
    if time.cost is not None:
        columns.insert(3, f"cost ({time.currency})")
        prices = [time.cost.get(str(row[0]), 0.0) for row in rows[:-1]]
        for row, price in zip(rows, [*prices, sum(time.cost.values())], strict=True):
            row.insert(3, f"{price:,.4f}")
    output.show_table(columns, rows)


def _tail(run: Run, summary: Summary) -> dict[str, object]:
    told, skipped = summary.checkpoints, summary.skipped_steps
    newest = "" if told.newest is None else f"; newest {told.newest} at step {told.newest_step:,}"
    failed = f"; {told.failed} given up, as the store failed" if told.failed else ""
    damaged = f"; {told.passed_over} found damaged" if told.passed_over else ""
    kept = ", ".join(map(str, kept_checkpoints(run))) or "none"
    unreadable = summary.unreadable_segments
    return {
        "goodput": _share(summary.time.goodput),
        "data wait": _share(summary.time.data_wait),
        "checkpoints": f"{told.committed} committed{newest}; kept: {kept}{failed}{damaged}",
        "resizes": summary.resizes or None,
        "skipped": f"{len(skipped)} batches, at steps {_few(skipped)}" if skipped else None,
        "events": f"{unreadable} damaged segments passed over" if unreadable else None,
    }


def _show_failures(summary: Summary) -> None:
    if not summary.failures:
        return
    hidden = len(summary.failures) - _MOST_FAILURES
    output.tell(f"\nfailures{f' (the last {_MOST_FAILURES}; {hidden} before)' if hidden > 0 else ''}")
    rows: list[list[object]] = []
    for failure in summary.failures[-_MOST_FAILURES:]:
        at = "" if failure.at is None else f"{failure.at:%Y-%m-%d %H:%M:%S}"
        back = "" if failure.back_s is None else f"{failure.back_s:.2f} s"
        rows.append([at, failure.what, failure.step, back, failure.detail])
    output.show_table(["at (UTC)", "what", "step", "back after", "how"], rows)


def _share(share: float | None) -> str | None:
    return None if share is None else f"{share:.1%}"


def _few(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    days, hours, minutes = whole // 86_400, whole % 86_400 // 3600, whole % 3600 // 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s"
