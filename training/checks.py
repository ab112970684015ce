"""What is checked before a run begins or goes on: its recipe against its data, its task and its own past.

Imports what the task's module imports, which may be torch. Knows no Ray.
"""

from __future__ import annotations

from datetime import datetime
from importlib.metadata import version as release_of

from cluster.errors import BadInput, NotFound, shown
from cluster.names import ModelRef
from cluster.runs import Run, RunRecord
from training.data.dataset import Dataset
from training.facts import DatasetFacts
from training.gate import check_gate
from training.origin import settle_origin
from training.recipe import Origin, Recipe
from training.tasks import build_task

_FIXED = ("model", "task", "options", "data", "optimization", "initialize_from")
"""Parts of a recipe that may not change once a run has started: they decide what the weights become."""


def prepare(run: Run, recipe: Recipe, began_at: datetime) -> DatasetFacts:
    """Check the recipe against its data and the run's past; record a new run.

    Args:
        began_at: what a new run's record says; UTC.

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
        recipe = settle_origin(recipe, facts, run.store)
        record = run.start(
            RunRecord(
                run=run.name,
                model=recipe.model,
                recipe=recipe.model_dump(mode="json"),
                facts=facts.model_dump(mode="json"),
                created_at=began_at,
                release=release_of("tandem-ray"),
            )
        )
    _check_unchanged(record, recipe, dataset)
    facts = DatasetFacts.model_validate(record.facts)
    _check(recipe, facts)
    return facts


def settled(recipe: Recipe, record: RunRecord) -> Recipe:
    """The recipe with what an alias in it stood for when the run began."""
    began = record.recipe.get("initialize_from")
    if recipe.initialize_from is None or began is None:
        return recipe
    ours, theirs = (ModelRef.parse(v) for v in (recipe.initialize_from.version, began["version"]))
    if ours.model != theirs.model or ours.version is not None:
        return recipe
    origin: Origin = recipe.initialize_from.model_copy(update={"version": str(theirs)})
    return recipe.model_copy(update={"initialize_from": origin})


def _check(recipe: Recipe, facts: DatasetFacts) -> None:
    task = build_task(recipe.task, facts, recipe.options)
    task.check_recipe(recipe)
    check_gate(recipe.gate, task.greater_is_better)


def _check_unchanged(record: RunRecord, recipe: Recipe, dataset: Dataset) -> None:
    now = settled(recipe, record).model_dump(mode="json")
    for part in _FIXED:
        if record.recipe.get(part) != now[part]:
            raise BadInput(
                f"run '{record.run}' was started with another '{part}'",
                got=shown(now[part]),
                allowed=shown(record.recipe.get(part)),
                fix="continue it with the recipe it was started with, or leave out 'run' for a new one",
            )
    if record.facts["fingerprint"] != dataset.fingerprint:
        raise BadInput(
            f"the training data changed since run '{record.run}' was started",
            got=f"fingerprint {dataset.fingerprint[:16]}…",
            allowed=f"fingerprint {str(record.facts['fingerprint'])[:16]}…",
            fix="restore the files, or start a new run on the new data",
        )
