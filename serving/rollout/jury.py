"""Carries out verdicts: shares a replica's evidence, judges it with everyone's, and writes to the log.

No replica is in charge. Each may abandon a candidate on its own evidence at once, since a version that
fails here fails elsewhere. All else is judged on the evidence of all replicas together, by whoever draws
the lot: with n replicas, each does it every n-th time or so, so the store is asked as often for a hundred
replicas as for one, and no replica's death leaves a trial without a judge. Two that act at once are told
apart by the log, which refuses the later one.

Runs in the follower's thread, because the store and the log block. Knows what `judge` says, not why.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

from cluster import trials
from cluster.errors import Conflict, TandemError
from cluster.names import ModelRef
from cluster.registry import Registry
from cluster.storage import Store
from cluster.trial import Trial
from serving.rollout.evidence import Evidence
from serving.rollout.judge import Verdict, judge
from serving.rollout.pool import Pool

logger = logging.getLogger("tandem.serving")


class Jury:
    """One replica's part in judging the trials of one alias.

    Args:
        replica: a name that no other replica has.
        draw: a random number in [0, 1).
    """

    def __init__(
        self,
        store: Store,
        ref: ModelRef,
        replica: str,
        *,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._store = store
        self._registry = Registry(store)
        self._ref = ref
        self._replica = replica
        self._draw = draw
        self._said: tuple[int, str] | None = None

    def sit(self, trial: Trial, evidence: Evidence, lasted_s: float) -> None:
        """Share what was seen, and act on it. Never raises: there is a next time.

        Args:
            trial: the one that is on, as this replica knows it.
            evidence: what this replica has seen in this step.
            lasted_s: how long it has known the step.
        """
        try:
            own = judge(trial, evidence, lasted_s)
            if own.action == "abandon":
                self._carry_out(trial, own)
                return
            pool = Pool(self._store, self._ref.model, trial)
            pool.give(self._replica, evidence)
            keys = pool.replicas()
            if self._draw() * len(keys) < 1:
                self._carry_out(trial, judge(trial, pool.together(keys), lasted_s))
        except Conflict as error:
            logger.info("%s: %s", self._ref, error)  # someone else was first
        except TandemError as error:
            logger.warning(
                "%s: the trial of version %d can't be judged now: %s", self._ref, trial.version, error
            )

    def _carry_out(self, trial: Trial, verdict: Verdict) -> None:
        model, alias = self._ref.model, self._ref.alias
        if verdict.action == "abandon":
            trials.abandon(self._registry, model, alias, trial, why=verdict.why)
        elif verdict.action == "promote":
            trials.promote(self._registry, model, alias, trial, why=verdict.why)
        elif verdict.action == "advance":
            trials.advance(self._registry, model, alias, trial, why=verdict.why)
        if verdict.action == "go on" or self._said == (trial.stepped, verdict.action):
            return
        self._said = (trial.stepped, verdict.action)
        logger.warning("%s: version %d: %s, %s", self._ref, trial.version, verdict.action, verdict.why)
