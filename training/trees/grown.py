"""What boosting has grown so far, and its checkpoint: one file, XGBoost's own UBJSON.

    booster.ubj        the trees, and as attributes what early stopping has to remember

Knows nothing of rows.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xgboost as xgb

from cluster.artifacts import Artifacts
from cluster.errors import Damaged, shown
from cluster.manifest import Manifest
from training.checkpoints.checkpoint import CheckpointMeta
from training.group import Group

BOOSTER_FILE = "booster.ubj"
_BEST_ROUND, _BEST_SCORE = "tandem_best_round", "tandem_best_score"


@dataclass(slots=True)
class Grown:
    """A booster after `step` rounds, None before the first. Whoever makes rounds gives it rows."""

    booster: xgb.Booster | None = None
    step: int = 0
    cursor: int = 0
    sound: bool = True


class Boosters:
    """Boosters, as `training.method.States`; `parameters` are XGBoost's."""

    def __init__(self, parameters: dict[str, Any]) -> None:
        self._parameters = parameters

    def blank(self, *, sharded: bool) -> Grown:
        assert not sharded, "trees are whole on every worker"
        return Grown()

    def begin(self, state: Grown) -> None:
        """There is nothing before the first round."""

    def load(self, state: Grown, artifacts: Artifacts, manifest: Manifest) -> CheckpointMeta:
        meta = CheckpointMeta.model_validate(manifest.meta)
        state.booster = self._restored(read_booster(artifacts, manifest))
        state.step, state.cursor = meta.step, meta.cursor
        return meta

    def replicate(self, state: Grown, source: int, group: Group) -> None:
        size = torch.zeros(1, dtype=torch.int64)
        saved = bytearray()
        if group.rank == source and state.booster is not None:
            saved = saved_booster(state.booster)
            size[0] = len(saved)
        dist.broadcast(size, source)
        if int(size) == 0:  # before the first round there is nothing to give
            return
        data = torch.from_numpy(np.frombuffer(saved, np.uint8) if saved else np.empty(int(size), np.uint8))
        dist.broadcast(data, source)
        if group.rank != source:
            state.booster = self._restored(bytearray(data.numpy()))

    def replace(self, held: Grown, by: Grown) -> None:
        held.booster = by.booster

    def with_rows(self, booster: xgb.Booster | None, rows: list[xgb.DMatrix]) -> xgb.Booster:
        """The same trees, with these rows' margins to be kept from round to round, and no others'.

        Margins are summed over the trees in their order whether round by round or at once, so a booster
        goes on to the last bit as if it had had these rows from the beginning.
        """
        if booster is None:
            return xgb.Booster(self._parameters, rows)
        return self._restored(saved_booster(booster), rows)

    def _restored(self, saved: bytearray, rows: list[xgb.DMatrix] | None = None) -> xgb.Booster:
        booster = xgb.Booster(self._parameters, rows, model_file=saved)
        booster.set_param(self._parameters)
        return booster


def saved_booster(booster: xgb.Booster) -> bytearray:
    """As UBJSON, with at least a round."""
    saved: bytearray = booster.save_raw("ubj")
    return saved


def read_booster(artifacts: Artifacts, manifest: Manifest) -> bytearray:
    """A checkpoint's booster, which XGBoost can read.

    Raises:
        Damaged: it isn't what was written, or no booster.
        NotFound: it is gone.
        StorageError: the store can't be read.
    """
    if BOOSTER_FILE not in manifest.files:
        raise _no_booster(manifest, ", ".join(manifest.files))
    saved = bytearray(artifacts.read_file(manifest, BOOSTER_FILE))
    with contextlib.suppress(xgb.core.XGBoostError):
        rounds = xgb.Booster(model_file=saved).num_boosted_rounds()
        if rounds == manifest.meta.get("step"):
            return saved
        raise _no_booster(manifest, f"a booster of {rounds} rounds")
    raise _no_booster(manifest, "a file that XGBoost can't read")


def best_round(booster: xgb.Booster) -> int | None:
    """How many rounds were best, as early stopping found; None where it doesn't watch."""
    found = booster.attr(_BEST_ROUND)
    return int(found) if found is not None else None


def note_score(booster: xgb.Booster, rounds: int, score: float) -> int:
    """Note what held-back rows say after so many rounds, less being better; gives the best one so far."""
    best = booster.attr(_BEST_SCORE)
    if best is None or score < float(best):
        booster.set_attr(**{_BEST_ROUND: str(rounds), _BEST_SCORE: repr(score)})
        return rounds
    return best_round(booster) or rounds


def _no_booster(manifest: Manifest, got: str) -> Damaged:
    return Damaged(
        f"checkpoint {manifest.number} does not hold the trees of its step",
        got=shown(got),
        allowed=f"{BOOSTER_FILE}, of as many rounds as the manifest says",
        fix="use an older checkpoint, or start a new run",
    )
