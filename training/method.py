"""A method: how a model comes about. Gradient descent (`training.descent`) and boosting (`training.trees`).

What a run is stays the same whichever method trains it: workers that form one generation after another, a
state that they agree on, steps, a cursor that counts the rows seen, checkpoints in the run's log, events,
the gate. A method says what a state is (`States`), how steps are made with it, how it is saved, and what
servable it becomes.

Knows neither torch nor XGBoost.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from cluster.artifacts import Artifacts
from cluster.clock import Clock
from cluster.errors import TandemError
from cluster.manifest import Manifest
from cluster.runs import Run
from training.facts import DatasetFacts
from training.group import Group
from training.problem import Problem
from training.recipe import Recipe

if TYPE_CHECKING:
    from training.checkpoints.checkpoint import CheckpointMeta
    from training.line import Line
    from training.memory import Memory
    from training.recorder import Recorder, Seat
    from training.reporter import Reporter


class Position(Protocol):
    """How far a state has come."""

    step: int
    """Steps done."""
    cursor: int
    """Rows seen by all workers together; a round of boosting sees every row."""


class State(Position, Protocol):
    """All that changes while training."""

    sound: bool
    """False once a step is known to have ruined it, or may have, unseen: not to be handed on to others."""


S = TypeVar("S", bound=State)


class States(Protocol[S]):
    """What can be done with one method's states."""

    def blank(self, *, sharded: bool) -> S:
        """One with nothing learnt; `sharded` over the ranks of the group that is formed."""
        ...

    def load(self, state: S, artifacts: Artifacts, manifest: Manifest) -> CheckpointMeta:
        """Overwrite a state, step and cursor too, with a checkpoint.

        Raises:
            Damaged: it isn't what was written, or of another model. `state` may be overwritten in part.
            NotFound: a file is gone.
            StorageError: the store can't be read.
        """
        ...

    def begin(self, state: S) -> None:
        """Make of a blank state the one that a run begins with, where there is no checkpoint.

        Raises:
            TandemError: what it begins with can't be read, or doesn't suit.
        """
        ...

    def replicate(self, state: S, source: int, group: Group) -> None:
        """Overwrite every rank's state with that of rank `source`; step and cursor stay.

        Raises:
            RuntimeError: a peer is gone.
        """
        ...

    def replace(self, held: S, by: S) -> None:
        """Whoever works with the first goes on with what the second has; step and cursor stay."""
        ...


class Saving(Protocol):
    """Commits checkpoints of one group's state; every rank has one and calls `save` at the same step."""

    last_blocking_s: float
    """How long the last `save` kept training waiting."""
    last_upload_s: float
    """How long the last one took from then until it was in the store."""

    @property
    def busy(self) -> bool:
        """Whether an earlier save has not ended yet, as far as this rank knows; rank 0 knows best."""
        ...

    def stepped(self, step_s: float) -> None:
        """A step ended that took `step_s`."""
        ...

    def save(self, meta: CheckpointMeta) -> None:
        """Take the state as it is, and commit it while training goes on. Raises: Conflict."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Until the last save has ended. Raises: StorageError, Conflict."""
        ...

    def close(self) -> None:
        """Abandon what is in flight, at once."""
        ...


@dataclass(frozen=True, slots=True)
class Terms:
    """What a worker's method is made for."""

    run: Run
    recipe: Recipe
    facts: DatasetFacts
    problem: Problem
    epoch: int
    """Of the driver's lease."""
    clock: Clock


@dataclass(frozen=True, slots=True)
class Heard:
    """Whom a saver tells, from threads of its own; `committed` and `gave_up` on rank 0 and everywhere."""

    committed: Callable[[Manifest], None]
    gave_up: Callable[[TandemError], None]
    troubled: Callable[[TandemError], None]


@dataclass(frozen=True, slots=True)
class Exported:
    """A servable's files by name, and which checkpoint, after how many steps, they were made of."""

    files: dict[str, bytes]
    checkpoint: int
    step: int


class Method(ABC, Generic[S]):
    """One worker's way to train, through all the generations that it takes part in.

    Raises:
        BadInput: from the constructor, if the dataset is not the one that the run began with.
    """

    memory: Memory[S]
    total_steps: int
    """At most so many."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms

    @abstractmethod
    def saver(self, seat: Seat, heard: Heard) -> Saving:
        """For one generation, of the state that memory holds now."""

    @abstractmethod
    def train(
        self, seat: Seat, line: Line, recorder: Recorder, saver: Saving, reporter: Reporter | None
    ) -> None:
        """Make steps to the end, telling the recorder of each.

        Args:
            reporter: rank 0's.

        Raises:
            AgreedStop: from the recorder.
            RuntimeError: a peer is gone.
            TandemError: whatever ends the run.
        """

    def close(self) -> None:
        """Let go of what outlives groups."""

    @staticmethod
    @abstractmethod
    def export(run: Run, problem: Problem) -> Exported | None:
        """The servable of a run's newest whole checkpoint; None where there is none.

        Raises:
            TandemError: the model can't become a graph, or the graph gives other answers than the model.
        """


def method_of(problem: Problem) -> type[Method[Any]]:
    """The class that trains a problem; imports it."""
    module, _, name = problem.method.partition(":")
    found: type[Method[Any]] = getattr(importlib.import_module(module), name)
    return found
