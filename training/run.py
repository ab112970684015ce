"""A whole run: check everything that can be checked, train, finish. What `tandem train` calls.

Everything a user can get wrong is refused before a Ray starts or a file is written. A cluster that is up is
told to import torch meanwhile.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.connection import connect
from cluster.errors import TandemError
from cluster.events import EventWriter
from cluster.imports import uncollected
from cluster.lease import acquire
from cluster.runs import Run, RunResult, new_run_name
from cluster.storage import open_store
from cluster.summary import write_summary
from training.progress import Progress, Show
from training.recipe import Recipe

if TYPE_CHECKING:
    from training.crew.called import Called


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
    began_at = clock.wall()
    show(Progress("reading the data"))
    run_name = recipe.run or new_run_name(recipe.model, clock)
    run = Run(open_store(recipe.store), run_name)

    def tell(note: str) -> None:
        show(Progress("waiting for the run's last driver", note=note))

    with contextlib.ExitStack() as stack:
        called = None
        if address is not None and run.result() is None:
            called = stack.enter_context(_called(recipe, address))
        with uncollected():
            from training.checks import (
                prepare,
                settled,
            )  # takes its time: after those who take longer were called

        facts = prepare(run, recipe, began_at)
        recipe = settled(recipe, run.record())
        done = run.result()
        if done is not None and done.gate == "passed":
            show(Progress("finished", note=f"run '{run_name}' has ended before; this is what it gave"))
            return done
        lease = stack.enter_context(acquire(run, take_over=take_over, tell=tell))
        show(Progress("starting workers"))
        try:
            if called is None:
                called = stack.enter_context(_called(recipe, address))
            from training.trainer import finish, fit

            outcome = fit(recipe, run_name, facts, called, show, lease.epoch)
            lease.check()
            return finish(recipe, run_name, outcome, show)
        except (TandemError, KeyboardInterrupt) as error:
            _tell_end(run, lease.epoch, error, clock)
            raise
        finally:
            write_summary(run)


@contextlib.contextmanager
def _called(recipe: Recipe, address: str | None) -> Iterator[Called]:
    """Connected to a cluster, on which those who take long are on their way."""
    with connect(address, needs_cpus=_cpus_needed(recipe), runtime_env=_runtime_env(recipe.task)):
        from training.trainer import call

        with call(recipe) as called:
            yield called


def _tell_end(run: Run, epoch: int, error: BaseException, clock: Clock) -> None:
    """Leave word in the run's events of why this driver ended."""
    said = error.parts() if isinstance(error, TandemError) else {"failed": "interrupted"}
    events = EventWriter(run.store, run.prefix, f"{clock.wall():%Y%m%dT%H%M%S}-driver{epoch}", clock)
    events.write("run-failed", **said)
    events.flush()


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
