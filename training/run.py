"""A whole run: check everything that can be checked, train, finish. What `tandem train` calls.

Everything a user can get wrong is refused before a Ray starts or a file is written.
"""

from __future__ import annotations

import importlib.util
import math
import os
from importlib.metadata import version as release_of
from pathlib import Path
from typing import Any

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.connection import connect
from cluster.errors import BadInput, NotFound, TandemError, shown
from cluster.events import EventWriter
from cluster.lease import acquire
from cluster.runs import Run, RunRecord, RunResult, new_run_name
from cluster.storage import open_store
from cluster.summary import write_summary
from training.data.dataset import Dataset
from training.facts import DatasetFacts
from training.gate import check_gate
from training.progress import Progress, Show
from training.recipe import Recipe
from training.tasks import build_task

_FIXED = ("model", "task", "options", "data", "optimization")
"""Parts of a recipe that may not change once a run has started: they decide what the weights become."""


def train(
    recipe: Recipe,
    *,
    address: str | None,
    show: Show,
    take_over: bool = False,
    clock: Clock = SYSTEM_CLOCK,
) -> RunResult:
    """Train, export, gate, register and promote, on a Ray cluster or on a local Ray of its own.

    A run that exists is continued from its newest checkpoint; one that has ended is not repeated. A run has
    one driver at a time: this one holds its lease until it returns.

    Args:
        address: of a Ray cluster; None starts a local Ray for the time of the run.
        show: is told how far the run is.
        take_over: become the run's driver even if another one lives.

    Raises:
        BadInput: the recipe, its data and its task don't fit together.
        Conflict: the run has a driver, or was taken over by another one.
        RunFailed: training ended without a commit.
    """
    show(Progress("reading the data"))
    run_name = recipe.run or new_run_name(recipe.model, clock)
    run = Run(open_store(recipe.store), run_name)
    facts = prepare(run, recipe, clock)
    done = run.result()
    if done is not None and done.gate == "passed":
        show(Progress("finished", note=f"run '{run_name}' has ended before; this is what it gave"))
        return done

    def tell(note: str) -> None:
        show(Progress("waiting for the run's last driver", note=note))

    with acquire(run, take_over=take_over, tell=tell) as lease:
        show(Progress("starting workers"))
        try:
            with connect(address, needs_cpus=_cpus_needed(recipe), runtime_env=_runtime_env(recipe.task)):
                from training.trainer import finish, fit  # starts Ray's own imports

                outcome = fit(recipe, run_name, facts, show, lease.epoch)
                lease.check()
                return finish(recipe, run_name, outcome, show)
        except (TandemError, KeyboardInterrupt) as error:
            _tell_end(run, lease.epoch, error, clock)
            raise
        finally:
            write_summary(run)


def _tell_end(run: Run, epoch: int, error: BaseException, clock: Clock) -> None:
    """Leave word in the run's events of why this driver ended."""
    said = error.parts() if isinstance(error, TandemError) else {"failed": "interrupted"}
    events = EventWriter(run.store, run.prefix, f"{clock.wall():%Y%m%dT%H%M%S}-driver{epoch}", clock)
    events.write("run-failed", **said)
    events.flush()


def prepare(run: Run, recipe: Recipe, clock: Clock) -> DatasetFacts:
    """Check the recipe against its data and the run's past; record a new run.

    Raises:
        BadInput: they don't fit together.
    """
    dataset = Dataset.open(recipe.data.train)
    Dataset.open(recipe.data.eval)
    try:
        record = run.record()
    except NotFound:
        facts = dataset.facts(recipe.data.label)
        _check(recipe, facts)
        record = run.start(
            RunRecord(
                run=run.name,
                model=recipe.model,
                recipe=recipe.model_dump(mode="json"),
                facts=facts.model_dump(mode="json"),
                created_at=clock.wall(),
                release=release_of("tandem-ray"),
            )
        )
    _check_unchanged(record, recipe, dataset)
    facts = DatasetFacts.model_validate(record.facts)
    _check(recipe, facts)
    return facts


def _check(recipe: Recipe, facts: DatasetFacts) -> None:
    task = build_task(recipe.task, facts, recipe.options)
    check_gate(recipe.gate, task.greater_is_better)


def _check_unchanged(record: RunRecord, recipe: Recipe, dataset: Dataset) -> None:
    now = recipe.model_dump(mode="json")
    for part in _FIXED:
        if record.recipe[part] != now[part]:
            raise BadInput(
                f"run '{record.run}' was started with another '{part}'",
                got=shown(now[part]),
                allowed=shown(record.recipe[part]),
                fix="continue it with the recipe it was started with, or leave out 'run' for a new one",
            )
    if record.facts["fingerprint"] != dataset.fingerprint:
        raise BadInput(
            f"the training data changed since run '{record.run}' was started",
            got=f"fingerprint {dataset.fingerprint[:16]}…",
            allowed=f"fingerprint {str(record.facts['fingerprint'])[:16]}…",
            fix="restore the files, or start a new run on the new data",
        )


def _cpus_needed(recipe: Recipe) -> int:
    """Logical CPUs a local Ray must have for the smallest number of workers to be placed."""
    return max(1, math.ceil(recipe.workers.min * recipe.workers.cpus))


def _runtime_env(task: str) -> dict[str, Any]:
    """What lets workers on this machine import a task that lies beside the recipe, not installed.

    On other machines the folder doesn't exist, which does no harm: there the package must be
    installed, or sent along by `tandem submit --package`.
    """
    module, colon, _ = task.partition(":")
    spec = importlib.util.find_spec(module.partition(".")[0]) if colon else None
    if spec is None:
        return {}
    origin = next(iter(spec.submodule_search_locations or ()), spec.origin)
    if origin is None:
        return {}
    folder = str(Path(origin).parent)
    before = os.environ.get("PYTHONPATH")
    return {"env_vars": {"PYTHONPATH": os.pathsep.join([folder, before] if before else [folder])}}
