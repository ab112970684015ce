"""Which rows a run was trained on, worked out again from a checkpoint's ledger and the plan.

The ledger says which positions of the training order were consumed; the plan says which row stands
at each position. So for each epoch every row must come exactly once, and in the epoch under way
every row before the cursor. Whatever doesn't is named by file, row group and row. Batches that were
left out on purpose (their loss ruined the weights) are named too; they are no mistake.

Positions are counted as ranges and rows as arrays, a shuffle window at a time, so a large dataset
takes as much memory as a small one. Of the dataset only the footers are read. Doesn't import torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import Damaged, NotFound, shown
from cluster.runs import Run
from training.data.dataset import Dataset
from training.data.plan import Plan
from training.recipe import Recipe

NAMED_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Segment:
    """As much of a ledger's entry as matters here: positions [start, stop) of the training order."""

    start: int
    stop: int
    attempt: str
    skipped: bool = False


@dataclass(frozen=True, slots=True)
class RowName:
    """One row of a dataset, as one finds it: number `row` within row group `group` of `file`."""

    file: str
    group: int
    row: int
    times: int
    """How often it was consumed in the epoch."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """Rows left out on purpose, at `rows` positions from `position` of an epoch's order on."""

    epoch: int
    position: int
    rows: int
    attempt: str
    names: tuple[RowName, ...]
    """The first of them."""


@dataclass(frozen=True, slots=True)
class EpochAudit:
    """One epoch: how many rows should have come, and those that came another number of times."""

    epoch: int
    due_rows: int
    missing_rows: int
    repeated_rows: int
    missing: tuple[RowName, ...]
    """The first of them."""
    repeated: tuple[RowName, ...]


@dataclass(frozen=True, slots=True)
class Audit:
    """What was found. `problems` says it in words; empty, all is as it should be."""

    run: str
    checkpoint: int
    step: int
    cursor: int
    dataset: str
    dataset_rows: int
    segments: int
    attempts: int
    epochs: tuple[EpochAudit, ...]
    skipped: tuple[Skipped, ...]
    problems: tuple[str, ...]


def audit(run: Run, number: int | None = None) -> Audit:
    """Check what a checkpoint says that it was made of; the newest without a `number`.

    Raises:
        NotFound: no such run, checkpoint or dataset.
        Damaged: the checkpoint's manifest can't be read.
        StorageError: the store or the dataset can't be read.
    """
    recipe = Recipe.model_validate(run.record().recipe)
    manifest = run.checkpoints().read(number) if number is not None else run.checkpoints().last()
    if manifest is None or manifest.is_fence:
        raise NotFound(
            f"the run '{run.name}' has no such checkpoint",
            got="none" if number is None else f"number {number}",
            allowed="the number of a checkpoint",
            fix="see `tandem logs` for those that were committed",
        )
    ledger = read_ledger(manifest.meta)
    step, cursor, fingerprint = (manifest.meta[name] for name in ("step", "cursor", "fingerprint"))
    dataset = Dataset.open(recipe.data.train)
    problems = ledger_problems(ledger, cursor)
    epochs: tuple[EpochAudit, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    if dataset.fingerprint != fingerprint:
        problems.append(
            f"the dataset isn't the one trained on: its fingerprint is {dataset.fingerprint[:16]}…, "
            f"the checkpoint's {fingerprint[:16]}…; rows can't be named"
        )
    else:
        plan = dataset.plan(recipe.optimization.seed)
        epochs = tuple(audit_epochs(dataset, plan, ledger, cursor))
        skipped = tuple(_skipped(dataset, plan, ledger))
        problems += [
            f"epoch {epoch.epoch}: {epoch.missing_rows:,} rows missing, {epoch.repeated_rows:,} repeated"
            for epoch in epochs
            if epoch.missing_rows or epoch.repeated_rows
        ]
    attempts = len({segment.attempt for segment in ledger})
    return Audit(
        run.name,
        manifest.number,
        step,
        cursor,
        dataset.uri,
        dataset.rows,
        len(ledger),
        attempts,
        epochs,
        skipped,
        tuple(problems),
    )


def read_ledger(meta: Mapping[str, Any]) -> list[Segment]:
    """The ledger in a checkpoint's `meta`.

    Raises:
        Damaged: it isn't one.
    """
    try:
        int(meta["step"]), int(meta["cursor"]), str(meta["fingerprint"])
        return [
            Segment(int(s["start"]), int(s["stop"]), str(s["attempt"]), bool(s.get("skipped", False)))
            for s in meta["ledger"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(
            "the checkpoint's ledger can't be read",
            got=shown(f"{type(error).__name__}: {error}"),
            allowed="step, cursor, fingerprint, and a list of ranges of rows",
            fix="check another checkpoint, or one made by this release",
        ) from None


def ledger_problems(ledger: Sequence[Segment], cursor: int) -> list[str]:
    """Where the ledger isn't one line from 0 to the cursor, each segment going on where the last ended."""
    problems = []
    ends = [0, *(segment.stop for segment in ledger)]
    for end, segment in zip(ends, ledger, strict=False):
        if segment.start != end:
            problems.append(f"attempt {segment.attempt} began at {segment.start:,}, not at {end:,}")
        if segment.stop <= segment.start:
            problems.append(
                f"attempt {segment.attempt} has a range from {segment.start:,} to {segment.stop:,}"
            )
    if ends[-1] != cursor:
        problems.append(f"the ledger ends at {ends[-1]:,}, the cursor is {cursor:,}")
    return problems


def audit_epochs(
    dataset: Dataset, plan: Plan, ledger: Sequence[Segment], cursor: int
) -> Iterator[EpochAudit]:
    """Every epoch that the ledger or the cursor touches."""
    ends = [cursor, *(segment.stop for segment in ledger)]
    for epoch in range(-(-max(ends) // plan.rows_per_epoch)):
        yield _audit_epoch(dataset, plan, ledger, cursor, epoch)


def _audit_epoch(
    dataset: Dataset, plan: Plan, ledger: Sequence[Segment], cursor: int, epoch: int
) -> EpochAudit:
    first = epoch * plan.rows_per_epoch
    due = min(max(cursor - first, 0), plan.rows_per_epoch)
    ranges = np.asarray([(s.start - first, s.stop - first) for s in ledger], np.int64).reshape(-1, 2)
    ranges = ranges[(ranges[:, 0] < plan.rows_per_epoch) & (ranges[:, 1] > 0)]
    missing, repeated = _Found(dataset), _Found(dataset)
    touched = np.zeros(len(dataset.row_groups), np.int64)
    for number, (low, high) in enumerate(pairwise(plan.window_bounds(epoch).tolist())):
        window = plan.window(epoch, number)
        touched += np.bincount(window.groups, minlength=len(touched))
        # A range counts up where it starts and down where it stops: what stands between is the sum.
        steps = np.zeros(high - low + 1, np.int64)
        np.add.at(steps, np.clip(ranges[:, 0] - low, 0, high - low), 1)
        np.add.at(steps, np.clip(ranges[:, 1] - low, 0, high - low), -1)
        # By place, not by position: an order that isn't a permutation would be found out here.
        counted = np.bincount(window.order, weights=np.cumsum(steps)[:-1], minlength=high - low)
        times = counted.astype(np.int64)
        wanted = np.bincount(window.order[: max(due - low, 0)], minlength=len(times))
        if low < due and due >= high:
            wanted[:] = 1
        if (times != wanted).any():
            row_ids = _row_ids(dataset, window.groups)
            missing.add(row_ids, times, np.flatnonzero(times < wanted))
            repeated.add(row_ids, times, np.flatnonzero(times > wanted))
    assert (touched == 1).all(), "the plan's windows don't hold each row group once"
    return EpochAudit(epoch, due, missing.rows, repeated.rows, tuple(missing.names), tuple(repeated.names))


def _row_ids(dataset: Dataset, groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """The dataset rows of some groups laid end to end."""
    found = [dataset.row_groups[group] for group in groups]
    return np.concatenate([np.arange(g.first_row, g.first_row + g.rows, dtype=np.int64) for g in found])


class _Found:
    """Rows of one kind: all are counted, the first are named."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.rows = 0
        self.names: list[RowName] = []

    def add(self, row_ids: NDArray[np.int64], times: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        self.rows += len(places)
        for place in places[: NAMED_ROWS - len(self.names)]:
            self.names.append(name_row(self._dataset, int(row_ids[place]), int(times[place])))


def name_row(dataset: Dataset, row_id: int, times: int) -> RowName:
    """The file, row group and row of a dataset's row."""
    group = dataset.row_groups[dataset.group_of(row_id)]
    return RowName(dataset.files[group.file], group.group, row_id - group.first_row, times)


def _skipped(dataset: Dataset, plan: Plan, ledger: Sequence[Segment]) -> Iterator[Skipped]:
    rows = plan.rows_per_epoch
    for segment in ledger:
        if not segment.skipped:
            continue
        # A batch never crosses an epoch's end, but batches that follow one another may be one segment.
        for epoch in range(segment.start // rows, -(-segment.stop // rows)):
            start = max(segment.start - epoch * rows, 0)
            stop = min(segment.stop - epoch * rows, rows)
            row_ids = plan.row_ids(epoch, start, min(stop, start + NAMED_ROWS))
            names = tuple(name_row(dataset, int(row_id), 0) for row_id in row_ids)
            yield Skipped(epoch, start, stop - start, segment.attempt, names)
