"""The version that a run begins with: settled when the run begins, and checked against what it learns.

A version's weights are those of the checkpoint that its servable was made of; the manifest of the servable
names it, and it is kept for as long as there is the servable (cluster.pins). So a version carries nothing
twice, and serving never sees a weight file.

Doesn't import torch; `training.fine_tuning` does.
"""

from __future__ import annotations

from cluster.artifacts import Artifacts
from cluster.errors import BadInput, NotFound, shown
from cluster.manifest import Manifest
from cluster.names import ModelRef
from cluster.registry import Registry
from cluster.runs import Run
from cluster.storage import Store
from training.facts import DatasetFacts
from training.recipe import Origin, Recipe
from training.tasks import build_task


def settle_origin(recipe: Recipe, facts: DatasetFacts, store: Store) -> Recipe:
    """The recipe with the version that `initialize_from` stands for now, if that suits it.

    Raises:
        NotFound: no such version, or its checkpoint is gone.
        BadInput: it is of another task; or its classes or words are others, and nothing is left out.
    """
    origin = recipe.initialize_from
    if origin is None:
        return recipe
    ref = ModelRef.parse(origin.version)
    version = Registry(store).resolve(ref)
    settled = origin.model_copy(update={"version": f"{ref.model}@{version.version}"})
    run, _ = made_of(settled, store)
    record = run.record()
    if record.recipe["task"] != recipe.task:
        raise BadInput(
            f"{settled.version} can't be begun with",
            got=f"task {shown(record.recipe['task'])}",
            allowed=f"a version of task {shown(recipe.task)}",
            fix="correct initialize_from, or the task",
        )
    ours = build_task(recipe.task, facts, recipe.options)
    theirs = build_task(
        recipe.task, DatasetFacts.model_validate(record.facts), record.recipe.get("options") or {}
    )
    same = (ours.facts.labels, ours.vocabularies()) == (theirs.facts.labels, theirs.vocabularies())
    if not same and not origin.leave_out:
        raise BadInput(
            f"what {settled.version} has learnt of classes or words doesn't fit this data",
            got="other classes" if ours.facts.labels != theirs.facts.labels else "other words in a column",
            allowed="the same ones in the same order, or initialize_from.leave_out",
            fix="leave out the parameters that belong to them, such as 'head.*' or 'embeddings.*'",
        )
    return recipe.model_copy(update={"initialize_from": settled})


def made_of(origin: Origin, store: Store) -> tuple[Run, Manifest]:
    """The run that made a version, and the checkpoint that its servable was made of.

    Raises:
        NotFound: there is no such version, or its servable or checkpoint is gone.
        Damaged: one of them is not what was written.
    """
    registry = Registry(store)
    manifest, _ = registry.servable(registry.resolve(ModelRef.parse(origin.version)))
    name, number = manifest.meta.get("run"), manifest.meta.get("checkpoint")
    if not isinstance(name, str) or not isinstance(number, int):
        raise NotFound(
            f"{origin.version} doesn't say which checkpoint it was made of",
            allowed="a version that a run of this store has made",
            fix="begin with another version",
        )
    run = Run(store, name)
    artifacts: Artifacts = run.checkpoints()
    return run, artifacts.read(number)
