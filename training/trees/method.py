"""Boosting: the method of `boosted-trees`. A step is a round, and every round sees every row.

Each worker sorts its share of the rows into bins once a generation (`training.trees.share`); in each round
XGBoost sums the workers' histograms, and all of them grow the same tree. So the cursor moves by the whole
dataset a round, the ledger counts each row once a round, and what a run gives depends on the number of
workers only as far as sums of floats do.

The workers are the crew's, like those of networks (`training.crew`): placed by Ray Train, and outliving
their group. `ray.train.xgboost` was weighed: it starts all workers anew when one is lost, and has checkpoints
travel through Ray, where neither the lease nor the run's log sees them. Here a survivor keeps its trees, a
round that breaks off is made again by the next generation, and a run that is resumed at the same number of
workers has the same trees to the last bit.
"""

from __future__ import annotations

import time
from typing import Any, cast

import torch
import xgboost as xgb

from cluster.manifest import Writer
from cluster.runs import Run
from training.checkpoints.checkpoint import CheckpointMeta
from training.data.dataset import Dataset
from training.line import Line
from training.loop import REPORT_EVERY_STEPS, StepReport
from training.memory import Memory
from training.method import Exported, Heard, Method, Saving, Terms
from training.problem import Problem
from training.recorder import Recorder, Seat
from training.reporter import Reporter
from training.tasks.trees import BoostedTrees
from training.trees.collective import Collective
from training.trees.export import export_booster
from training.trees.grown import Boosters, Grown, best_round, note_score, read_booster
from training.trees.saver import BoosterSaver
from training.trees.share import Shares, read_share

_PATIENCE_MARGIN_S = 60.0


class Boosting(Method[Grown]):
    """One worker's."""

    def __init__(self, terms: Terms) -> None:
        super().__init__(terms)
        recipe = terms.recipe
        self._trees = cast(BoostedTrees, terms.problem)
        self._dataset = Dataset.open(recipe.data.train, disk_bytes=int(recipe.data.cache_gib * 2**30))
        self._dataset.check_unchanged(terms.facts.fingerprint)
        self._threads = max(1, int(recipe.workers.cpus))
        self._boosters = Boosters(parameters(self._trees, self._threads, recipe.optimization.seed))
        self.total_steps = self._trees.options.rounds
        fingerprint = terms.facts.fingerprint
        self.memory = Memory(terms.run, "ddp", fingerprint, self._boosters, torch.device("cpu"))

    def saver(self, seat: Seat, heard: Heard) -> BoosterSaver:
        state = self.memory.state
        return BoosterSaver(
            self.terms.run,
            state,
            seat.recipe.checkpoint,
            seat.group,
            newest=self.memory.head,
            writer=Writer(epoch=self.terms.epoch, generation=seat.group.generation),
            heard=heard,
            clock=self.terms.clock,
        )

    def train(
        self, seat: Seat, line: Line, recorder: Recorder, saver: Saving, reporter: Reporter | None
    ) -> None:
        """Rounds to the last, or until held-back rows have got no better for long enough."""
        collective = Collective(seat.group, seat.recipe.faults.stuck_s + _PATIENCE_MARGIN_S)
        let_go = seat.control.on_part

        def part() -> None:
            let_go()
            collective.abort()

        seat.control.on_part = part
        state = self.memory.state
        with xgb.config_context(verbosity=0), collective.formed():
            if self._is_over(state):
                return
            seat.control.phase = "restoring"
            recorder.switch("data")
            rows = read_share(
                self._dataset,
                self._trees,
                rank=seat.group.rank,
                world=seat.group.world,
                seed=seat.recipe.optimization.seed,
                threads=self._threads,
            )
            held = [rows.train, *([rows.held_back] if rows.held_back is not None else [])]
            seat.control.phase = "training"
            recorder.switch("compute")
            booster = self._boosters.with_rows(state.booster, held)
            while not self._is_over(state):
                self._round(state, booster, rows, recorder)

    def _round(self, state: Grown, booster: xgb.Booster, rows: Shares, recorder: Recorder) -> None:
        began_s = time.monotonic()
        recorder.begin_step(state.step)
        booster.update(rows.train, state.step)
        done = state.step + 1
        try:
            loss = self._judge(booster, rows, done, recorder)
        except xgb.core.XGBoostError:  # a peer is gone: without its judgement the round isn't done
            state.booster = booster[: state.step] if state.step else None
            raise
        state.booster, state.step, state.cursor = booster, done, done * self._dataset.rows
        recorder.on_step(
            StepReport(
                step=done,
                cursor=state.cursor,
                epoch=0,
                global_rows=self._dataset.rows,
                loss=loss,
                data_wait_s=0.0,
                step_s=time.monotonic() - began_s,
            )
        )

    def _judge(self, booster: xgb.Booster, rows: Shares, done: int, recorder: Recorder) -> float | None:
        """What early stopping has to know after `done` rounds; gives the loss on the rows trained on, if due.

        The note that it makes is a part of the booster, so it is made as the last thing.
        """
        due = done % REPORT_EVERY_STEPS == 0 or done == self.total_steps or recorder.is_due(done)
        loss = self._score(booster, rows.train, done) if due else None
        if rows.held_back is not None:
            note_score(booster, done, self._score(booster, rows.held_back, done))
        return loss

    @staticmethod
    def _score(booster: xgb.Booster, rows: xgb.DMatrix, rounds: int) -> float:
        """The mean loss over these rows of all workers."""
        said = booster.eval_set([(rows, "rows")], rounds - 1)
        return float(said.rpartition(":")[2])

    def _is_over(self, state: Grown) -> bool:
        stopping = self._trees.options.early_stopping
        best = best_round(state.booster) if state.booster is not None else None
        stalled = stopping is not None and best is not None and state.step - best >= stopping.rounds
        return stalled or state.step >= self.total_steps

    @staticmethod
    def export(run: Run, problem: Problem) -> Exported | None:
        trees = cast(BoostedTrees, problem)
        artifacts = run.checkpoints()
        found = artifacts.newest(
            lambda manifest: read_booster(artifacts, manifest), lambda number, error: None
        )
        if found is None:
            return None
        manifest, saved = found
        meta = CheckpointMeta.model_validate(manifest.meta)
        booster = xgb.Booster(model_file=saved)
        with xgb.config_context(verbosity=0):
            return Exported(export_booster(trees, booster, best_round(booster)), manifest.number, meta.step)


def parameters(trees: BoostedTrees, threads: int, seed: int) -> dict[str, Any]:
    """What XGBoost is told. A run's threads stay the same: sums of floats depend on them."""
    options = trees.options
    classes = len(trees.facts.labels)
    goal: dict[str, Any] = {"objective": "reg:squarederror", "eval_metric": "rmse"}
    if classes == 2:
        goal = {"objective": "binary:logistic", "eval_metric": "logloss"}
    elif classes:
        goal = {"objective": "multi:softprob", "eval_metric": "mlogloss", "num_class": classes}
    return goal | {
        "tree_method": "hist",
        "max_depth": options.depth,
        "eta": options.eta,
        "min_child_weight": options.min_child_weight,
        "gamma": options.min_split_loss,
        "lambda": options.l2,
        "alpha": options.l1,
        "max_bin": options.bins,
        "nthread": threads,
        "seed": seed % 2**31,
    }
