"""One training process's part of a run, through one generation of workers or many. Knows no Ray.

Every worker does the same: agree with the others on one state, read, step, save its share of each
checkpoint (`training.generation`). Where the state comes from is settled anew in each generation: from the
worker whose memory is furthest ahead, else from the newest whole checkpoint, else it is fresh. So whoever
starts workers, for the first time or the tenth, passes nothing on.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.events import EventWriter
from cluster.runs import Run
from cluster.storage import open_store
from training.control import Control
from training.device import worker_device
from training.facts import DatasetFacts
from training.generation import Generation, Kept, Outcome
from training.goodput import Account, AccountTeller
from training.group import Group, from_environment
from training.method import Terms, method_of
from training.progress import Progress
from training.recipe import Recipe
from training.recorder import Seat
from training.tasks import build_task
from training.telling import Telling


class Worker:
    """One training process. Make it once, then `train` in one group after another.

    Args:
        facts: of the dataset, as recorded when the run began.
        report: takes rank 0's progress.
        epoch: of the driver's lease.
        member: this process's name among the run's.

    Raises:
        BadInput: the dataset is not the one that the run began with.
    """

    def __init__(
        self,
        recipe: Recipe,
        run_name: str,
        facts: DatasetFacts,
        *,
        report: Callable[[Progress], None],
        epoch: int = 0,
        member: str = "",
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        run = Run(open_store(recipe.store), run_name)
        problem = build_task(recipe.task, facts, recipe.options)
        method = method_of(problem)(Terms(run, recipe, facts, problem, epoch, clock))
        self._account = Account(clock)
        self._recipe = recipe
        self._run = run
        self._kept = Kept(
            method=method,
            telling=Telling(run, recipe, facts, report, self._account, method.total_steps, clock),
            member=member or f"pid{os.getpid()}",
            clock=clock,
        )

    def train(self, group: Group, control: Control) -> Outcome:
        """Take part in a formed group until the last step is committed, or all stop as agreed.

        Whatever is raised, the state after the last finished step is kept for the next group, unless a step
        may have ruined it.

        Raises:
            RunFailed: batches ruined the weights more often than the recipe allows.
            TandemError: as the method, the checkpoints and the loader say.
            RuntimeError: from torch, where a peer is gone.
        """
        kept = self._kept
        events = EventWriter(
            self._run.store, self._run.prefix, f"{group.attempt}-rank{group.rank}", kept.clock
        )
        teller = AccountTeller(self._account, events, kept.member, kept.clock)
        seat = Seat(self._recipe, group, control, self._account, teller, events, kept.clock)
        self._account.switch("restart")
        ended = False
        try:
            outcome = Generation(kept, seat).take_part()
            ended = not outcome.paused
            return outcome
        finally:
            control.phase, control.waiting = "waiting", False
            self._account.switch("restart")
            teller.tell(generation=group.generation, rank=group.rank, final=ended)
            if ended:
                events.flush()
            else:
                events.request_flush()  # the others wait for this one, and must not wait for the store

    def close(self) -> None:
        """Let go of what outlives groups."""
        self._kept.method.close()
        self._kept.telling.close()


def run_worker(
    recipe: Recipe,
    run_name: str,
    facts: DatasetFacts,
    *,
    report: Callable[[Progress], None],
    clock: Clock = SYSTEM_CLOCK,
) -> Outcome:
    """Train alone, or in the group that `training.group.from_environment` formed, to the last commit.

    Raises:
        TandemError: as `Worker.train`.
    """
    worker = Worker(recipe, run_name, facts, report=report, clock=clock)
    try:
        with from_environment(worker_device(recipe), clock) as group:
            return worker.train(group, Control())
    finally:
        worker.close()
