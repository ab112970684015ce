"""Commits boosters while trees grow: rank 0 puts the file and the manifest, the others hear how it ended.

A booster is the same on every rank and small (a megabyte for some hundred trees), so one thread of one rank
does it: no shares, no arena, no process beside the trainer as for weights. A store that fails is tried again
until the recipe's patience ends, then costs the checkpoint and not the run. A newer writer ends the run for
this one: `Conflict`.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import threading
from datetime import timedelta

from torch.distributed import DistError, DistStoreError

from cluster.attempts import Attempt
from cluster.clock import Clock
from cluster.errors import Conflict, StorageError, TandemError, shown
from cluster.manifest import FileEntry, Manifest, Writer
from cluster.retry import retried
from cluster.runs import Run
from training.checkpoints.checkpoint import CheckpointMeta
from training.checkpoints.retention import Retention
from training.group import Group
from training.method import Heard
from training.recipe import Checkpointing
from training.trees.grown import BOOSTER_FILE, Grown, saved_booster

_LOOK_EVERY_S = 1.0
_DONE = ""
_log = logging.getLogger(__name__)


class BoosterSaver:
    """One rank's, for one generation (`training.method.Saving`).

    Args:
        state: what is saved.
        newest: the newest number taken in the run's log of checkpoints, as far as is known.
        writer: who this group is, among those who have written this run or will.
        heard: told on rank 0.
    """

    def __init__(
        self,
        run: Run,
        state: Grown,
        policy: Checkpointing,
        group: Group,
        *,
        newest: int,
        writer: Writer,
        heard: Heard,
        clock: Clock,
    ) -> None:
        self.last_blocking_s = 0.0
        self.last_upload_s = 0.0
        self._run = run
        self._artifacts = run.checkpoints()
        self._state = state
        self._policy = policy
        self._is_first = group.rank == 0
        self._store = group.client()
        self._key = f"boosters/{writer.epoch}/{writer.generation}"
        self._newest = newest
        self._writer = writer
        self._heard = heard
        self._clock = clock
        self._retention = Retention(run, policy)
        self._count = 0
        self._thread: threading.Thread | None = None
        self._error: TandemError | None = None
        self._fatal: Exception | None = None
        self._is_closed = False

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def stepped(self, step_s: float) -> None:
        """Nothing here goes by how long rounds take."""

    def save(self, meta: CheckpointMeta) -> None:
        if self._fatal is not None:
            raise self._fatal
        self._count += 1
        if not self._is_first:
            return
        began_s = self._clock.monotonic_s()
        if (
            self._thread is not None
        ):  # rank 0 proposes no save while one is under way; the last one may meet one
            self._thread.join()
        assert self._state.booster is not None, "saved after a round"
        saved, self._error = bytes(saved_booster(self._state.booster)), None
        self._thread = threading.Thread(
            target=self._work, args=(saved, meta, self._count), name="boosters", daemon=True
        )
        self._thread.start()
        self.last_blocking_s = self._clock.monotonic_s() - began_s

    def wait(self, timeout_s: float) -> None:
        """Until the last save has ended, on this rank as on rank 0."""
        due_s = self._clock.monotonic_s() + timeout_s
        if self._is_first:
            if self._thread is not None:
                self._thread.join(timeout_s)
            if self.busy:
                raise _late(timeout_s)
        elif self._count and (said := self._verdict(due_s, timeout_s)) != _DONE:
            raise StorageError("rank 0 could not commit the last checkpoint", got=said, fix="see its events")
        if self._fatal is not None:
            raise self._fatal
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        self._is_closed = True

    def _verdict(self, due_s: float, timeout_s: float) -> str:
        assert self._store is not None, "alone, one is rank 0"
        key = f"{self._key}/{self._count}"
        while not self._is_closed and self._clock.monotonic_s() < due_s:
            try:
                self._store.wait([key], timedelta(seconds=_LOOK_EVERY_S))
                return self._store.get(key).decode()
            except DistStoreError:
                continue  # not yet
        raise _late(timeout_s)

    def _work(self, saved: bytes, meta: CheckpointMeta, count: int) -> None:
        said = _DONE
        try:
            self._commit(saved, meta, count)
        except Conflict as error:
            self._fatal, said = error, shown(error.failed)
        except TandemError as error:
            self._error, said = error, shown(error.failed)
            if not self._is_closed:
                self._heard.gave_up(error)
        except Exception as bug:  # noqa: BLE001 - a thread's edge: raised again by the next call
            _log.exception("checkpoint of round %d", meta.step)
            self._fatal, said = bug, shown(str(bug))
        if self._store is not None and not self._is_closed:
            try:
                self._store.set(f"{self._key}/{count}", said)
            except DistError:
                return  # the group is gone, and nobody waits

    def _commit(self, saved: bytes, meta: CheckpointMeta, count: int) -> None:
        began_s = self._clock.monotonic_s()
        name = Attempt(self._writer, count, secrets.token_hex(6)).name
        key = f"{self._artifacts.folder(self._newest + 1, name)}/{BOOSTER_FILE}"
        entry = FileEntry(key=key, size_bytes=len(saved), sha256=hashlib.sha256(saved).hexdigest())

        def commit() -> Manifest:
            self._run.store.put(key, saved)
            described = meta.model_dump(mode="json")
            return self._artifacts.publish(
                self._newest + 1, name, {BOOSTER_FILE: entry}, described, self._writer
            )

        manifest = retried(
            commit, transient=self._is_worth_another_try, retry_s=self._policy.retry_s, clock=self._clock
        )
        self._newest = manifest.number
        self.last_upload_s = self._clock.monotonic_s() - began_s
        if not self._is_closed:
            self._heard.committed(manifest)
            self._retention.after_commit(manifest)

    def _is_worth_another_try(self, error: Exception) -> bool:
        if not isinstance(error, StorageError) or self._is_closed:
            return False
        self._heard.troubled(error)
        return True


def _late(timeout_s: float) -> StorageError:
    return StorageError(
        "the last checkpoint is not committed yet",
        got=f"nothing after {timeout_s:g} s",
        fix="give the store more time (checkpoint.retry_s), or look at the events of the run for why",
    )
