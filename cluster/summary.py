"""What a run's events come to: how far it is, how fast, what it cost, what went wrong. Read by people.

Works on a run in progress, and on whatever is left of damaged events. Nothing is decided from it.
The summary is worked out from the events each time; `runs/RUN/summary.json` is a copy that each attempt
leaves when it ends, for other tools and for runs whose events were deleted.
"""

from __future__ import annotations

import heapq
import math
import statistics
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from pydantic import Field

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.config import Frozen
from cluster.errors import Damaged, NotFound, StorageError
from cluster.events import Event, read_segments
from cluster.goodput import KINDS, TimeBook, moment
from cluster.runs import Run

CURVE_POINTS = 400
_RATES = 30
"""So many of the latest reports decide what a run's samples/s are now."""
_FAILURES = (
    "member-lost",
    "rolled-back",
    "checkpoint-delayed",
    "checkpoint-passed-over",
    "gave-up",
    "run-failed",
)
_ENDS = ("gave-up", "run-failed")


class Failure(Frozen):
    """Something went wrong, and when steps went on after it."""

    at: datetime | None
    what: str
    detail: str
    step: int | None = None
    back_s: float | None = None
    """Seconds until the next group stood; None where it hasn't, or where none was needed."""


class Checkpoints(Frozen):
    """What became of a run's checkpoints, as its events tell."""

    committed: int
    newest: int | None
    newest_step: int | None
    failed: int
    """Given up for the store's sake; training went on."""
    passed_over: int
    """Found damaged, so that an older one was used."""


class Time(Frozen):
    """Worker-seconds by kind (`cluster.goodput`), and what they cost."""

    worker_s: dict[str, float]
    total_s: float
    wall_s: float
    goodput: float | None
    """The share that was compute, of what was not lent."""
    data_wait: float | None
    """The share of waiting for data in the time of steps."""
    price_per_worker_hour: float | None = None
    currency: str | None = None
    cost: dict[str, float] | None = None
    """By kind; together the run's cost."""


class Summary(Frozen):
    """A run, as far as its events tell."""

    format: int = 1
    run: str
    last_event_at: datetime | None
    step: int | None
    total_steps: int | None
    epoch: int | None
    loss: float | None
    curve: tuple[tuple[float, float], ...]
    """(step, mean loss of the steps around it), at most 400 points; of a step done twice, the later."""
    first_step_s: float | None = None
    """From the run's beginning to the end of its first step, by the clocks of two processes."""
    samples_per_s: float | None
    """Over all workers, the median of the latest reports."""
    workers: int | None
    mfu: float | None
    """Model FLOPs utilisation, 0 to 1; None where the device's peak isn't known."""
    time: Time
    checkpoints: Checkpoints
    failures: tuple[Failure, ...]
    resizes: int
    skipped_steps: tuple[int, ...]
    """Steps that were left without an update, because their batch ruins the weights."""
    given_up: str | None
    """Why the latest attempt ended without a result, if it said so."""
    unreadable_segments: int = Field(ge=0)
    """Parts of the events that are damaged or gone."""


def summarise(run: Run) -> Summary:
    """Work a run's summary out from its events.

    Raises:
        StorageError: the store can't be read.
    """
    digest = _Digest()
    for segment in read_segments(run.store, run.prefix):
        digest.add(segment)
    recipe, facts, began_at = _asked(run)
    return digest.summary(run.name, recipe, facts, began_at)


def write_summary(run: Run) -> bool:
    """Leave `summary.json` as an attempt ends. A store that fails costs the summary, never the run.

    Returns:
        Whether it was written.
    """
    try:
        run.store.put(f"{run.prefix}/summary.json", summarise(run).model_dump_json(indent=1).encode())
    except StorageError:
        return False
    return True


def read_summary(run: Run) -> Summary | None:
    """The summary that the last attempt left; None where there is none that can be read."""
    try:
        return Summary.model_validate_json(run.store.get(f"{run.prefix}/summary.json"))
    except (NotFound, ValueError):
        return None


def _asked(run: Run) -> tuple[Mapping[str, Any], Mapping[str, Any], datetime | None]:
    """The recipe, the data's facts and the beginning; nothing where the record can't be read."""
    try:
        record = run.record()
    except (NotFound, Damaged):
        return {}, {}, None
    return record.recipe, record.facts, record.created_at


class _Step(NamedTuple):
    """A report of rank 0; there may be hundreds of thousands, so only what is needed of each."""

    first_at: str
    at: str
    """Of the last time that it was done."""
    loss: float | None
    epoch: int | None
    samples_per_s: float | None


class _Digest:
    """Takes events, in any order but each writer's own, and keeps what the summary needs."""

    def __init__(self) -> None:
        self._book = TimeBook()
        self._steps: dict[int, _Step] = {}
        self._told: dict[str, list[Event]] = {}
        self._last_at = ""
        self._unreadable = 0

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            name, at = event.get("event"), event.get("at")
            if isinstance(at, str) and at > self._last_at:
                self._last_at = at
            if name == "step":
                self._add_step(event)
            elif name == "account":
                self._book.add(event)
            elif name == "unreadable":
                self._unreadable += 1
            elif isinstance(name, str):
                self._book.add(event)
                self._told.setdefault(name, []).append(event)

    def _add_step(self, event: Event) -> None:
        step = event.get("step")
        if type(step) is not int:
            return
        known, at = self._steps.get(step), _at(event)
        if known is None or at >= known.at:
            self._steps[step] = _Step(
                at if known is None else known.first_at,
                at,
                _number(event, "loss"),
                _whole(event, "epoch"),
                _number(event, "samples_per_s"),
            )
        elif at < known.first_at:
            self._steps[step] = known._replace(first_at=at)

    def summary(
        self, run: str, recipe: Mapping[str, Any], facts: Mapping[str, Any], began_at: datetime | None
    ) -> Summary:
        steps = sorted(self._steps.items())
        losses = [(float(number), step.loss) for number, step in steps if step.loss is not None]
        latest = max(self._steps.values(), key=lambda step: step.at, default=None)
        workers = self._workers()
        rate = self._rate()
        return Summary(
            run=run,
            last_event_at=moment({"at": self._last_at}),
            step=self._reached(),
            total_steps=self._total_steps(recipe, facts),
            epoch=latest.epoch if latest else None,
            loss=latest.loss if latest else None,
            curve=_thinned(losses),
            first_step_s=self._first_step_s(began_at),
            samples_per_s=rate,
            workers=workers,
            mfu=self._mfu(rate, workers),
            time=self._time(recipe.get("cost")),
            checkpoints=self._checkpoints(),
            failures=self._failures(),
            resizes=len(self._told.get("resize", ())),
            skipped_steps=tuple(sorted({n for e in self._of("batch-skipped") if (n := _whole(e, "step"))})),
            given_up=self._given_up(),
            unreadable_segments=self._unreadable,
        )

    def _of(self, *names: str) -> list[Event]:
        """Events of these names, in order of time."""
        return sorted((e for name in names for e in self._told.get(name, ())), key=_at)

    def _reached(self) -> int | None:
        done = self._of("checkpoint-committed", "attempt-finished", "attempt-paused")
        known = [*self._steps, *(step for e in done if (step := _whole(e, "step")) is not None)]
        return max(known, default=None)

    def _first_step_s(self, began_at: datetime | None) -> float | None:
        told = self._of("first-step")
        at = moment(told[0]) if told else None
        return (at - began_at).total_seconds() if at and began_at else None

    def _total_steps(self, recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> int | None:
        """As the workers said, who know what a step is; before they have begun, what it is for networks."""
        started = [n for event in self._of("attempt-started") if (n := _whole(event, "total_steps"))]
        return started[-1] if started else _total_steps(recipe, facts)

    def _rate(self) -> float | None:
        latest = heapq.nlargest(_RATES, self._steps.values(), key=lambda step: step.at)
        rates = [step.samples_per_s for step in latest if step.samples_per_s]
        return statistics.median(rates) if rates else None

    def _workers(self) -> int | None:
        started = self._of("generation-started", "attempt-started")
        return _whole(started[-1], "world") if started else None

    def _mfu(self, rate: float | None, workers: int | None) -> float | None:
        model = self._of("model-flops")
        flops = _number(model[-1], "flops_per_row") if model else None
        peak = _number(model[-1], "peak_flops_per_s") if model else None
        if not (rate and workers and flops and peak):
            return None
        return rate * flops / (workers * peak)

    def _time(self, cost: object) -> Time:
        spent = self._book.goodput().with_redone(self._redone_s())
        of_steps = sum(spent.worker_s[kind] for kind in ("compute", "data", "communication", "save"))
        price = _number(cost, "per_worker_hour") if isinstance(cost, Mapping) else None
        currency = str(cost.get("currency", "")) if isinstance(cost, Mapping) else None
        return Time(
            worker_s={kind: round(spent.worker_s[kind], 3) for kind in KINDS},
            total_s=round(spent.total_s, 3),
            wall_s=round(spent.wall_s, 3),
            goodput=spent.goodput,
            data_wait=spent.worker_s["data"] / of_steps if of_steps > 0 else None,
            price_per_worker_hour=price,
            currency=currency if price is not None else None,
            cost=None if price is None else {k: spent.worker_s[k] / 3600 * price for k in KINDS},
        )

    def _redone_s(self) -> float:
        """Worker-seconds of steps that new processes repeated, because only an older checkpoint was left.

        They can't know how far others had come. (A process that goes back itself does: training.goodput.)
        """
        total_s = 0.0
        for started in self._of("attempt-started"):
            begun, step, since = _at(started), _whole(started, "step"), moment(started)
            if started.get("rank") != 0 or started.get("source") != "store" or step is None or since is None:
                continue
            reached = max((n for n, each in self._steps.items() if each.first_at < begun), default=0)
            again = (each.at for n, each in self._steps.items() if step < n <= reached and each.at > begun)
            passed = moment({"at": max(again, default=None)})
            if passed is not None:
                total_s += (passed - since).total_seconds() * (_whole(started, "world") or 1)
        return total_s

    def _checkpoints(self) -> Checkpoints:
        committed = {n: e for e in self._of("checkpoint-committed") if (n := _whole(e, "checkpoint"))}
        newest = max(committed, default=None)
        return Checkpoints(
            committed=len(committed),
            newest=newest,
            newest_step=_whole(committed[newest], "step") if newest is not None else None,
            failed=len(self._told.get("checkpoint-failed", ())),
            passed_over=len({_whole(e, "checkpoint") for e in self._of("checkpoint-passed-over")}),
        )

    def _failures(self) -> tuple[Failure, ...]:
        stood = [at for e in self._of("generation-started") if (at := moment(e)) is not None]
        found: dict[tuple[object, ...], Failure] = {}
        for event in self._of(*_FAILURES):
            at, what, step = moment(event), str(event["event"]), _whole(event, "step")
            told = next((str(event[key]) for key in ("how", "why", "got", "failed") if event.get(key)), "")
            detail, lost = told.split("\n", 1)[0], what == "member-lost"
            back = next((then for then in stood if lost and at is not None and then >= at), None)
            back_s = (back - at).total_seconds() if back and at else None
            # Several ranks tell of one and the same, each at its own time; a loss is told once.
            same = (what, event.get("checkpoint"), step, detail, event.get("at") if lost else None)
            found.setdefault(same, Failure(at=at, what=what, detail=detail, step=step, back_s=back_s))
        return tuple(found.values())

    def _given_up(self) -> str | None:
        ends = self._of(*_ENDS, "generation-started", "attempt-started")
        if not ends or ends[-1]["event"] not in _ENDS:
            return None
        return str(ends[-1].get("failed") or ends[-1].get("why") or "it said no more")


def _at(event: Event) -> str:
    return str(event.get("at", ""))


def _number(event: Mapping[str, Any], name: str) -> float | None:
    value: Any = event.get(name)
    return float(value) if type(value) in (float, int) and math.isfinite(value) else None


def _whole(event: Mapping[str, Any], name: str) -> int | None:
    value = event.get(name)
    return value if type(value) is int else None


def _total_steps(recipe: Mapping[str, Any], facts: Mapping[str, Any]) -> int | None:
    rows, optimization = facts.get("rows"), recipe.get("optimization")
    if type(rows) is not int or not isinstance(optimization, Mapping):
        return None
    batch, epochs = optimization.get("global_batch_size"), optimization.get("epochs")
    if type(batch) is not int or type(epochs) is not int or batch < 1:
        return None
    return epochs * -(-rows // batch)


def _thinned(losses: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """At most `CURVE_POINTS` points: the means of as many equal parts."""
    size = -(-len(losses) // CURVE_POINTS) or 1
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    return tuple((part[-1][0], math.fsum(loss for _, loss in part) / len(part)) for part in parts)


def age_s(summary: Summary, clock: Clock = SYSTEM_CLOCK) -> float | None:
    """Seconds since the last event, by this machine's clock against its writer's. For people's eyes."""
    if summary.last_event_at is None:
        return None
    return max(0.0, (clock.wall() - summary.last_event_at).total_seconds())
