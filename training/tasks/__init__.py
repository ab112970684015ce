"""From the name in a recipe to a task: one of the built-in ones, or a user's own class.

    image-classification        training.tasks.image
    boosted-trees               training.tasks.trees
    tabular-classification      training.tasks.tabular
    tabular-regression          training.tasks.tabular
    package.module:MyTask       imported from wherever Python finds it

Built-in tasks are imported when they are asked for, by the same rule as a user's.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from cluster.config import validated
from cluster.errors import BadInput, shown
from training.facts import DatasetFacts
from training.problem import Problem

BUILT_IN = {
    "image-classification": "training.tasks.image:ImageClassification",
    "boosted-trees": "training.tasks.trees:BoostedTrees",
    "tabular-classification": "training.tasks.tabular:TabularClassification",
    "tabular-regression": "training.tasks.tabular:TabularRegression",
}
"""Where each built-in task stands, by its name in a recipe."""


def resolve_task(name: str) -> type[Problem]:
    """The class that a recipe's `task` stands for.

    Raises:
        BadInput: no such task, a module that can't be imported, or a class that isn't a whole task.
    """
    module_name, colon, class_name = BUILT_IN.get(name, name).partition(":")
    if not colon:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        raise BadInput(
            "there is no such task",
            got=shown(name),
            allowed=", ".join(BUILT_IN) + ", or package.module:Class",
            fix=f"did you mean '{near[0]}'?" if near else "choose one, or name a class of your own",
        )
    found = getattr(_imported(module_name, name), class_name, None)
    if not (isinstance(found, type) and issubclass(found, Problem)):
        raise BadInput(
            f"'{name}' is not a task",
            got=f"no '{class_name}' in '{module_name}'" if found is None else shown(found),
            allowed="a subclass of training.task.Task",
            fix=f"define class {class_name}(Task) in {module_name}",
        )
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise BadInput(
            f"the task '{name}' is not whole",
            got=f"methods not written: {missing}",
            allowed="a class that has every abstract method of its base",
            fix=f"write {missing}",
        )
    return found


def build_task(recipe_task: str, facts: DatasetFacts, options: Mapping[str, Any]) -> Problem:
    """The task of a recipe, bound to its dataset.

    Args:
        recipe_task: the recipe's `task`.
        facts: what is known of the training data.
        options: the recipe's `options`, checked here against the task's own `Options`.

    Raises:
        BadInput: as `resolve_task`, or options or data that the task can't use.
    """
    cls = resolve_task(recipe_task)
    task = cls(facts, validated(cls.Options, options, f"the options of {recipe_task}"))
    task.check()
    return task


def _imported(module_name: str, task_name: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise BadInput(
            f"the task '{task_name}' can't be imported",
            got=f"no module named '{error.name}'",
            allowed="a module that Python finds, here and on every worker",
            fix="install its package, or run where it can be imported (see PYTHONPATH)",
        ) from error
    except Exception as error:  # a user's module may raise anything
        raise BadInput(
            f"the task '{task_name}' can't be imported: '{module_name}' fails",
            got=shown(f"{type(error).__name__}: {error}"),
            allowed="a module that can be imported",
            fix=f"try it: python -c 'import {module_name}'",
        ) from error
