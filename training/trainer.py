"""Training on the connected cluster, as the driver sees it: who is started, what is shown, how it ends.

The driver calls a keeper on every node and Ray Train's controller (`training.crew.called`), then starts a
coordinator (`training.crew.coordinator`), and gives Ray Train its order (`training.crew.placement`), in this
turn, because each is loading while the next one is started. Then it listens. Ray Train may fail and be
started again meanwhile; training ends when the coordinator says so.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import secrets
import tempfile
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import ray

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import RunFailed, TandemError, shown
from cluster.local import find
from cluster.runs import RunResult
from training.crew.called import Called
from training.crew.coordinator import Coordinator, News, Plan
from training.crew.lending import coordinator_name
from training.crew.nursery import DEFAULT_LIFE
from training.crew.placement import Placement, start_controller
from training.crew.roles import Outcome, Rules
from training.facts import DatasetFacts
from training.progress import Progress, Show
from training.recipe import Recipe, Workers
from training.trackers import settings, take_settings

CONTROLLER_FAILURES = 5
_ANSWER_S = 30.0


def call(recipe: Recipe, life: str = DEFAULT_LIFE) -> Called:
    """What `fit` wants first; there may be something to do until they are ready.

    Args:
        life: what training processes live by.
    """
    return Called(_resources(recipe.workers), life)


def fit(
    recipe: Recipe,
    run_name: str,
    facts: DatasetFacts,
    called: Called,
    show: Show,
    epoch: int = 0,
    *,
    clock: Clock = SYSTEM_CLOCK,
) -> Outcome:
    """Train on the connected cluster until the last step is committed.

    Args:
        called: what `call` gave; they are gone afterwards.
        epoch: of this driver's lease.

    Raises:
        TandemError: one that retrying can't mend, from a worker.
        RunFailed: workers failed more often than the recipe allows, or the coordinator was lost.
    """
    plan = _plan(recipe, run_name, facts, epoch, called.life, clock)
    # Below a local Ray's own folder, so that it goes with that Ray even if this process is killed.
    local = find(ray.get_runtime_context().gcs_address)
    place = local.record.temp_dir if local else None
    with (
        tempfile.TemporaryDirectory(prefix="tandem-train-", dir=place) as folder,
        _crew(plan, called) as crew,
    ):
        return _follow(crew, called.controller, recipe, plan, folder, show)


def _plan(recipe: Recipe, run_name: str, facts: DatasetFacts, epoch: int, life: str, clock: Clock) -> Plan:
    workers = recipe.workers
    rules = Rules(
        run=run_name,
        attempt=f"{clock.wall():%Y%m%dT%H%M%S}-{secrets.token_hex(4)}",
        min_workers=workers.min,
        max_workers=workers.max,
        silent_s=recipe.faults.silent_s,
        stuck_s=recipe.faults.stuck_s,
        retry_s=recipe.checkpoint.retry_s,
        max_failures=recipe.max_failures,
    )
    spec = {
        "recipe": recipe.model_dump(mode="json"),
        "run": run_name,
        "facts": facts.model_dump(mode="json"),
        "epoch": epoch,
        "environment": settings(),
    }
    return Plan(rules, recipe.store, spec, _resources(workers), life)


def _resources(workers: Workers) -> dict[str, float]:
    return {"CPU": workers.cpus, **({"GPU": workers.gpus} if workers.gpus else {})}


@contextlib.contextmanager
def _crew(plan: Plan, called: Called) -> Iterator[Any]:
    """A coordinator that employs the keepers; all processes of the run are gone at the end."""
    here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    make: Any = ray.remote(num_cpus=0, max_concurrency=10_000, label_selector=here)(Coordinator)
    coordinator = _named(make, coordinator_name(plan.rules.run, plan.store)).remote(plan)
    begun = coordinator.begin.remote(called.keepers)  # failing only as a whole, which `news` tells
    try:
        yield coordinator
    finally:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(coordinator.farewell.remote(), timeout=_ANSWER_S)
        called.close()
        ray.kill(coordinator)
        del begun


def _named(make: Any, name: str) -> Any:
    """Named, so that commands find it; an actor of the run's last driver may still be on its way out."""
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(name))
    return make.options(name=name)


def _follow(crew: Any, controller: Any, recipe: Recipe, plan: Plan, folder: str, show: Show) -> Outcome:
    """Show what happens until the coordinator says that it is over."""

    def start(controller: Any) -> Placement:
        place, workers = tempfile.mkdtemp(dir=folder), (recipe.workers.min, recipe.workers.max)
        return Placement(controller, plan.rules.run, crew, workers, plan.worker, place)

    stage, lost = start(controller), 0
    try:
        news, end = crew.news.remote(), None
        while end is None:
            ready, _ = ray.wait([news, stage.done], num_returns=1)
            if news in ready:
                heard: News = ray.get(news)
                stage.groups = heard.groups
                end = _show_news(heard, show)
                news = crew.news.remote()
            elif lost == CONTROLLER_FAILURES:
                raise _ended_early(plan.rules.run, stage.failure())
            else:
                lost += 1
                show(Progress("training", note="Ray Train's controller was lost; it is started again"))
                stage.abandon()
                stage = start(start_controller())
    except ray.exceptions.RayActorError as error:
        stage.abandon()
        raise RunFailed(
            f"the coordinator of run '{plan.rules.run}' was lost",
            got=shown(str(error).strip().splitlines()[0]),
            fix=f"the same command with run={plan.rules.run} continues it",
        ) from None
    except BaseException:
        stage.abandon()
        raise
    stage.close()
    if isinstance(end, TandemError):
        raise end
    return end


def _show_news(news: News, show: Show) -> Outcome | TandemError | None:
    for note in news.notes:
        show(Progress("training", note=note))
    if news.progress is not None:
        show(Progress(**news.progress))
    return news.end


def _ended_early(run_name: str, failure: str) -> RunFailed:
    return RunFailed(
        f"Ray Train could not keep the workers of run '{run_name}'",
        got=shown(failure.strip().rsplit("\n", 1)[-1]),
        allowed=f"at most {CONTROLLER_FAILURES} losses of its controller",
        fix=f"see tandem logs {run_name}; the same command with run={run_name} continues it",
    )


def finish(recipe: Recipe, run_name: str, outcome: Outcome, show: Show) -> RunResult:
    """Export, evaluate, judge and register, in one Ray task with the resources of one worker."""
    make: Any = ray.remote(num_cpus=recipe.workers.cpus, max_retries=1, num_returns="streaming")(_finish_task)
    try:
        said = None
        for ref in make.remote(recipe.model_dump(mode="json"), run_name, outcome.samples_per_s, settings()):
            said = ray.get(ref)
            if isinstance(said, Progress):
                show(said)
    except ray.exceptions.RayTaskError as error:
        raise told(error.cause, "export or evaluation") from error
    except ray.exceptions.RayError as error:
        raise RunFailed(
            "the process that exports and evaluates was lost",
            got=shown(str(error).strip().split("\n", 1)[0]),
            fix="run the same command again: training is done, and is not repeated",
        ) from error
    assert isinstance(said, RunResult), "the last thing said is the result"
    return said


def _finish_task(
    recipe: dict[str, Any], run_name: str, samples_per_s: float, tracking: dict[str, str]
) -> Iterator[Progress | RunResult]:
    """Tells of its progress while it works, then gives the result."""
    from training.finish import finish_run

    take_settings(tracking)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    said: queue.SimpleQueue[Progress | RunResult | BaseException] = queue.SimpleQueue()

    def work() -> None:
        try:
            said.put(
                finish_run(
                    Recipe.model_validate(recipe), run_name, samples_per_s=samples_per_s, show=said.put
                )
            )
        except BaseException as error:  # noqa: BLE001 - raised below, in the task's own thread
            said.put(error)

    threading.Thread(target=work, name="finish", daemon=True).start()
    while isinstance(message := said.get(), Progress):
        yield message
    if isinstance(message, BaseException):
        raise message
    yield message


def told(error: BaseException, doing: str) -> TandemError:
    """An error that a person can act on: itself, or for what any code may raise, what and where."""
    if isinstance(error, TandemError):
        return error
    frames = traceback.extract_tb(error.__traceback__)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    return RunFailed(
        f"{doing} failed in the task's own code, or in what it called",
        got=shown(f"{type(error).__name__}: {error}") + where,
        fix="correct it, then run the same command again; with --run NAME a run goes on where it was",
    )
