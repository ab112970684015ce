"""From a run's last checkpoint to a version: export, evaluate the servable, judge, register, promote.

What is measured is the servable in ONNX Runtime, never the torch module: the gate judges what will
be served. Repeating this after a crash registers nothing twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from cluster.errors import Conflict, NotFound, RunFailed
from cluster.manifest import Manifest, read_file
from cluster.names import ModelRef
from cluster.registry import Registry, Version
from cluster.runs import Run, RunResult
from cluster.storage import Store, open_store
from training.data.dataset import Dataset
from training.evaluate import evaluate, evaluate_live
from training.facts import DatasetFacts
from training.gate import Incomparable, judge
from training.method import method_of
from training.problem import Problem
from training.progress import Progress, Show
from training.recipe import Recipe
from training.tasks import build_task
from training.trackers import openers
from training.tracking import Tracking

_TRACKERS_HAVE_S = 20.0
"""Importing MLflow alone takes seconds."""


def finish_run(recipe: Recipe, run_name: str, *, samples_per_s: float, show: Show) -> RunResult:
    """Turn the newest checkpoint of a run that has trained to its end into a version, if the gate lets it.

    Raises:
        RunFailed: the run has no checkpoint.
        TandemError: from export, evaluation and storage.
    """
    torch.set_num_threads(max(1, int(recipe.workers.cpus)))
    store = open_store(recipe.store)
    run = Run(store, run_name)
    facts = DatasetFacts.model_validate(run.record().facts)
    task = build_task(recipe.task, facts, recipe.options)
    show(Progress("exporting"))
    exported = method_of(task).export(run, task)
    if exported is None:
        raise RunFailed(f"run '{run_name}' has no checkpoint to export", fix="train it first")
    files = exported.files
    show(Progress("evaluating"))
    held_out = Dataset.open(recipe.data.eval)
    metrics = evaluate(files, held_out, task).metrics
    live = _live_metrics(recipe, store, task, held_out)
    verdict = judge(recipe.gate, metrics, live, task.greater_is_better)
    meta = {
        "runtime": "onnx",
        "model": recipe.model,
        "run": run_name,
        "checkpoint": exported.checkpoint,
        "step": exported.step,
        "metrics": metrics,
        "gate": {"passed": verdict.passed, "reasons": list(verdict.reasons)},
    }
    version = None
    if verdict.passed:
        show(Progress("registering"))
        version = _register(recipe, run, files, meta, metrics)
    else:
        _commit(run, files, meta)
        show(Progress("gate refused", note="gate refused: " + "; ".join(verdict.reasons)))
    result = RunResult(
        run=run_name,
        model=recipe.model,
        version=version.version if version else None,
        store=recipe.store,
        # JSON has no NaN; the gate has refused it already, and its reason says which.
        metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
        steps=exported.step,
        samples_per_s=samples_per_s,
        gate="passed" if verdict.passed else "failed",
    )
    _tell_trackers(run, result, show)
    run.finish(result)
    return result


def _tell_trackers(run: Run, result: RunResult, show: Show) -> None:
    """What was measured, and that the run ends; before its result is recorded: later nobody comes back."""
    tracking = Tracking(
        openers(run, "result", adds_only=True), lambda note: show(Progress("finishing", note=note))
    )
    measured = {f"held-out {name}": value for name, value in result.metrics.items()}
    tracking.log(result.steps, **measured, **{"passed the gate": float(result.gate == "passed")})
    tracking.close(finished=True, timeout_s=_TRACKERS_HAVE_S)


def _live_metrics(
    recipe: Recipe, store: Store, task: Problem, held_out: Dataset
) -> Mapping[str, float] | Incomparable | None:
    """The promoted version's metrics on the same held-out data, None where there is nothing to compare."""
    if recipe.gate is None or recipe.gate.no_worse_than_live_by is None or recipe.promote_to is None:
        return None
    registry = Registry(store)
    try:
        live = registry.resolve(ModelRef(recipe.model, recipe.promote_to))
    except NotFound:
        return None
    manifest, _ = registry.servable(live)
    files = {name: read_file(store, manifest, name) for name in manifest.files}
    measured = evaluate_live(files, held_out, task)
    return measured if isinstance(measured, Incomparable) else measured.metrics


def _commit(run: Run, files: dict[str, bytes], meta: dict[str, object]) -> Manifest:
    servables = run.servables()
    for _ in range(8):
        try:
            return servables.commit(servables.head() + 1, files, meta)
        except Conflict:
            continue  # two drivers finish one run at once: each may have its servable
    raise RunFailed(f"the servable of run '{run.name}' could not be committed", fix="run it again")


def _register(
    recipe: Recipe, run: Run, files: dict[str, bytes], meta: dict[str, object], metrics: dict[str, float]
) -> Version:
    registry = Registry(run.store)
    why = f"run {run.name} passed its gate"
    key = run.servables().key(_commit(run, files, meta).number)
    version = registry.register(
        recipe.model,
        manifest_key=key,
        manifest=run.store.get(key),
        run=run.name,
        metrics=metrics,
        why=why,
        once=True,
    )
    if recipe.promote_to is not None:
        registry.promote(recipe.model, recipe.promote_to, version.version, why=why)
    return version
