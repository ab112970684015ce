"""One training process's part of a run, through one generation of workers or many. Knows no Ray.

Every worker does the same: agree with the others on one state, read, step, save its share of each
checkpoint (`training.generation`). Where the state comes from is settled anew in each generation: from the
worker whose memory is furthest ahead, else from the newest whole checkpoint, else it is fresh. So whoever
starts workers, for the first time or the tenth, passes nothing on.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.events import EventWriter
from cluster.runs import Run
from cluster.storage import open_store
from training.checkpoints.saver import Stage
from training.control import Control
from training.data.dataset import Dataset
from training.facts import DatasetFacts
from training.generation import Generation, Kept, Outcome
from training.goodput import Account, AccountTeller
from training.group import Group, from_environment
from training.memory import Memory
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
        torch.set_num_threads(max(1, int(recipe.workers.cpus)))
        run = Run(open_store(recipe.store), run_name)
        dataset = Dataset.open(recipe.data.train, disk_bytes=int(recipe.data.cache_gib * 2**30))
        dataset.check_unchanged(facts.fingerprint)
        plan = dataset.plan(recipe.optimization.seed)
        steps_per_epoch = plan.steps_per_epoch(recipe.optimization.global_batch_size)
        total_steps = recipe.optimization.epochs * steps_per_epoch
        task = build_task(recipe.task, facts, recipe.options)
        device = worker_device(recipe)
        self._account = Account(clock)
        self._kept = Kept(
            run=run,
            recipe=recipe,
            task=task,
            dataset=dataset,
            plan=plan,
            total_steps=total_steps,
            device=device,
            memory=Memory(run, recipe, facts.fingerprint, task, device),
            stage=Stage(),
            telling=Telling(run, recipe, facts, report, self._account, total_steps, clock),
            epoch=epoch,
            member=member or f"pid{os.getpid()}",
            clock=clock,
        )

    def train(self, group: Group, control: Control) -> Outcome:
        """Take part in a formed group until the last step is committed, or all stop as agreed.

        Whatever is raised, the state after the last finished step is kept for the next group, unless a step
        may have ruined it.

        Raises:
            RunFailed: batches ruined the weights more often than the recipe allows.
            TandemError: as `training.loop.train_steps`, `training.checkpoints.checkpoint` and the loader say.
            RuntimeError: from torch, where a peer is gone.
        """
        kept = self._kept
        events = EventWriter(kept.run.store, kept.run.prefix, f"{group.attempt}-rank{group.rank}", kept.clock)
        teller = AccountTeller(self._account, events, kept.member, kept.clock)
        seat = Seat(kept.recipe, group, control, self._account, teller, events, kept.clock)
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
        self._kept.stage.close()
        self._kept.telling.close()


def worker_device(recipe: Recipe) -> torch.device:
    """What this process's steps run on."""
    return torch.device("cuda", torch.cuda.current_device()) if recipe.workers.gpus else torch.device("cpu")


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
