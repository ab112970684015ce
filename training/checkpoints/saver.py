"""Commits checkpoints of one group's state while training goes on. Every rank has one; all save alike.

`save` copies this rank's share into the arena and returns. A thread then has the uploader put the files,
tells the other ranks, and on rank 0 writes the layout and, last, the manifest. A
store that fails costs a checkpoint, not the run. A newer writer ends the run for this one: `Conflict`.

Knows nothing of processes that come and go; whoever does closes this saver and makes another.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import secrets
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass

from torch._C._distributed_c10d import Store  # torch.distributed's own, where it is typed

from cluster.attempts import Attempt
from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import Conflict, StorageError, TandemError, shown
from cluster.manifest import FileEntry, Manifest, Writer
from cluster.retry import retried
from cluster.runs import Run
from training.checkpoints.arena import reserved_bytes
from training.checkpoints.calm import Calm
from training.checkpoints.checkpoint import LAYOUT, CheckpointMeta, Layout
from training.checkpoints.exchange import Exchange, Left, Report, Told, Verdict
from training.checkpoints.pieces import OPTIMIZER, Held, Piece, Spec, held_state, hold, share
from training.checkpoints.retention import Retention
from training.checkpoints.stage import Snapshot, Stage
from training.checkpoints.throttle import NOBODY_STEPS
from training.loop import TrainState
from training.recipe import Checkpointing

__all__ = ["Saver", "Stage"]

_PATIENCE_S = 5.0
"""How long `save` waits for an upload that is still under way, before it is given up for the newer state."""
_GRACE_S = 30.0
"""For an uploader or a rank to say, after the deadline, that it has given up."""
_VERDICT_GRACE_S = 240.0
"""For rank 0 to gather and commit, after the deadline for files."""
_LOOK_EVERY_S = 0.2

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Save:
    """One checkpoint on its way."""

    count: int
    meta: CheckpointMeta
    snapshot: Snapshot
    specs: dict[str, Spec]
    began_s: float
    calm_s: float


class Saver:
    """Commits checkpoints of one group's state; every rank has one and calls `save` at the same step.

    Args:
        exchange: the group's key-value store, a client of its own; None where there is one rank.
        newest: the newest number taken in the run's log of checkpoints, as far as is known.
        writer: who this group is, among those who have written this run or will.
        on_commit: told by a thread of rank 0.
        on_failure: told by a thread, on every rank: a checkpoint was given up, training goes on.
        stage: this process's; without one, the saver makes one and closes it.
        on_trouble: told by a thread of failures of the store after which it is tried again.

    Attributes:
        state: what is saved; may be set to another one between saves.
        last_blocking_s: how long the last `save` kept training waiting, in seconds.
        last_upload_s: how long the last share took from then until it was in the store, in seconds.
    """

    def __init__(
        self,
        run: Run,
        state: TrainState,
        policy: Checkpointing,
        *,
        rank: int,
        world: int,
        exchange: Store | None,
        newest: int,
        writer: Writer,
        on_commit: Callable[[Manifest], None],
        on_failure: Callable[[TandemError], None],
        stage: Stage | None = None,
        on_trouble: Callable[[TandemError], None] | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self.state = state
        self.last_blocking_s = 0.0
        self.last_upload_s = 0.0
        self._run = run
        self._artifacts = run.checkpoints()
        self._policy = policy
        self._rank = rank
        self._world = world
        self._newest = newest
        self._writer = writer
        self._on_commit = on_commit
        self._on_failure = on_failure
        self._on_trouble = on_trouble or _ignore
        self._clock = clock
        self._stage = stage or Stage()
        self._owns_stage = stage is None
        name = f"checkpoints/{writer.epoch}/{writer.generation}"
        self._exchange = Exchange(exchange, name, rank, world, clock)
        self._word = secrets.token_hex(6)
        self._count = 0
        self._fatal: Exception | None = None
        self._last_error: TandemError | None = None
        self._trouble: TandemError | None = None
        self._is_closed = False
        self._changed = threading.Condition()
        self._unfinished = 0
        self._snapshot: Snapshot | None = None
        self._waiting: queue.SimpleQueue[_Save | None] = queue.SimpleQueue()
        self._retention = Retention(run, policy)
        self._retiring: threading.Thread | None = None
        self._calm = Calm(policy, clock.monotonic_s())
        self._waiters = 0
        self._stage.prepare(reserved_bytes(share(_expected(state), rank, world)))
        threading.Thread(target=self._work, name="saver", daemon=True).start()

    @property
    def busy(self) -> bool:
        """Whether an earlier save has not ended yet, as far as this rank knows; rank 0 knows best."""
        return self._unfinished > 0

    def stepped(self, step_s: float) -> None:
        """A step ended that took `step_s`; saves are not counted. So uploads learn how fast they may go."""
        slowdown = self._calm.stepped(step_s, is_quiet=not self.busy)
        if slowdown is not None:
            self._stage.tell(slowdown)

    def save(self, meta: CheckpointMeta) -> None:
        """Take a snapshot, and commit it while training goes on.

        An earlier save that is still being uploaded is given up after five seconds, on all ranks.

        Raises:
            Conflict: a newer writer has taken over; this run is no longer ours.
            BadInput: the state is not one that files can hold.
        """
        self._raise_if_fatal()
        began_s = self._clock.monotonic_s()
        held = held_state(self.state.model, self.state.optimizer)
        snapshot = self._stage.take(share(held, self._rank, self._world), self._rank, _PATIENCE_S)
        now_s = self._clock.monotonic_s()
        self.last_blocking_s = now_s - began_s
        with self._changed:
            self._unfinished += 1
        self._snapshot = snapshot
        calm_s = self._calm.saves(now_s)
        self._waiting.put(_Save(self._count, meta, snapshot, {h.name: h.spec for h in held}, now_s, calm_s))
        self._count += 1

    def wait(self, timeout_s: float) -> None:
        """Until the last save has ended, on this rank as on all others.

        Raises:
            StorageError: it was given up, or has not ended in time.
            Conflict: a newer writer has taken over.
        """
        with self._changed:
            self._waiters += 1
            self._stage.tell(NOBODY_STEPS)
            ended = self._changed.wait_for(lambda: not self._unfinished or self._is_closed, timeout_s)
            self._waiters -= 1
        self._raise_if_fatal()
        if self._last_error is not None and not self._unfinished:
            raise self._last_error
        if not ended or self._unfinished:
            raise StorageError(
                "the last checkpoint is not committed yet",
                got=f"nothing after {timeout_s:g} s{_told_of(self._trouble)}",
                fix="give the store more time (checkpoint.retry_s), or look at the events of the run for why",
            )

    def close(self) -> None:
        """Abandon what is in flight, at once, whether or not the other ranks are there. Nobody is told."""
        self._is_closed = True
        self._exchange.close()
        self._waiting.put(None)
        with self._changed:
            self._changed.notify_all()
        if self._owns_stage:
            self._stage.close()
        elif self._unfinished and self._snapshot is not None:
            self._stage.abandon(self._snapshot)

    def _work(self) -> None:
        while (save := self._waiting.get()) is not None:
            error: Exception | None = None
            try:
                self._take_through(save)
            except Left:
                return
            except TandemError as told:
                error = told
            except Exception as bug:  # noqa: BLE001 - a thread's edge: raised again by the next call
                _log.exception("checkpoint of step %d", save.meta.step)
                self._fatal = error = bug
            if self._is_closed:
                return
            self._end(error)

    def _end(self, error: Exception | None) -> None:
        self._last_error = error if isinstance(error, TandemError) else None
        self._trouble = None
        if isinstance(error, Conflict):
            self._fatal = error
        elif isinstance(error, TandemError):
            self._on_failure(error)
        with self._changed:
            self._unfinished -= 1
            self._changed.notify_all()

    def _take_through(self, save: _Save) -> None:
        report = self._put_share(save)
        due_s = save.began_s + self._policy.retry_s
        if self._rank > 0:
            self._exchange.report(save.count, report)
            verdict = self._exchange.hear(save.count, due_s + _VERDICT_GRACE_S)
            if verdict.trouble is not None:
                raise verdict.trouble.error
            self._newest = verdict.number
            return
        try:
            manifest = self._publish(save, self._exchange.gather(save.count, report, due_s + 2 * _GRACE_S))
        except Left:
            raise
        except Exception as error:
            told = error if isinstance(error, TandemError) else StorageError("a bug", got=shown(error))
            self._exchange.announce(save.count, Verdict(trouble=Told.of(told)))
            raise
        self._newest = manifest.number
        if not self._is_closed:
            self._on_commit(manifest)
            self._retire(manifest)
        self._exchange.announce(save.count, Verdict(number=manifest.number))

    def _put_share(self, save: _Save) -> Report:
        """Put this rank's files; what stands in the way is told to the others, whatever it is."""
        due_s = save.began_s + self._policy.retry_s
        try:
            upload = self._stage.upload(
                save.snapshot,
                store=self._run.store.uri,
                folder=self._artifacts.folder(self._newest + 1, self._nonce(save)),
                retry_s=max(due_s - self._clock.monotonic_s(), 0),
                calm_s=save.calm_s,
                mb_per_s=self._policy.upload_mb_per_s,
                on_trouble=self._tell_trouble,
            )
            if self._waiters:
                self._stage.tell(NOBODY_STEPS)
            entries = self._result(upload, due_s + _GRACE_S)
        except TandemError as error:
            self._stage.abandon(save.snapshot)
            return Report(trouble=Told.of(error))
        self.last_upload_s = self._clock.monotonic_s() - save.began_s
        return Report(entries=entries, pieces={file.name: file.pieces for file in save.snapshot.files})

    def _result(self, upload: Future[dict[str, FileEntry]], due_s: float) -> dict[str, FileEntry]:
        """What an upload gives; looks up now and then, to see whether it is wanted still."""
        while not self._is_closed:
            try:
                return upload.result(_LOOK_EVERY_S)
            except FutureTimeoutError:
                if self._clock.monotonic_s() > due_s:
                    raise StorageError(
                        "the process that uploads checkpoints says nothing",
                        got=f"nothing {_GRACE_S:g} s after the deadline that it was given",
                        fix="nothing: the next checkpoint starts another one",
                    ) from None
        raise Left

    def _publish(self, save: _Save, reports: list[Report]) -> Manifest:
        """Rank 0: the layout, then the manifest, tried again as long as the files were."""
        files = {name: pieces for report in reports for name, pieces in report.pieces.items()}
        entries = {name: entry for report in reports for name, entry in report.entries.items()}
        _check_whole(save.specs, files)
        layout = Layout(tensors=save.specs, files=files).model_dump_json().encode()
        nonce = self._nonce(save)
        key = f"{self._artifacts.folder(self._newest + 1, nonce)}/{LAYOUT}"
        entries[LAYOUT] = FileEntry(
            key=key, size_bytes=len(layout), sha256=hashlib.sha256(layout).hexdigest()
        )
        meta = save.meta.model_dump(mode="json")

        def commit() -> Manifest:
            if self._is_closed:
                raise Left
            self._run.store.put(key, layout)
            return self._artifacts.publish(self._newest + 1, nonce, entries, meta, self._writer)

        left_s = save.began_s + self._policy.retry_s + _GRACE_S - self._clock.monotonic_s()
        return retried(
            commit, transient=self._is_worth_another_try, retry_s=max(left_s, 0), clock=self._clock
        )

    def _nonce(self, save: _Save) -> str:
        """Of one attempt, the same on every rank."""
        due_s = save.began_s + self._policy.retry_s
        return Attempt(self._writer, save.count, self._exchange.name_attempts(self._word, due_s)).name

    def _retire(self, manifest: Manifest) -> None:
        """Delete what is not kept any longer, aside; what this leaves, the next commit's turn takes."""
        if self._retiring is None or not self._retiring.is_alive():
            self._retiring = threading.Thread(
                target=self._retention.after_commit, args=(manifest,), name="retention", daemon=True
            )
            self._retiring.start()

    def _is_worth_another_try(self, error: Exception) -> bool:
        if not isinstance(error, StorageError) or self._is_closed:
            return False
        self._tell_trouble(error)
        return True

    def _tell_trouble(self, error: TandemError) -> None:
        self._trouble = error
        if not self._is_closed:
            self._on_trouble(error)

    def _raise_if_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal


def _check_whole(specs: dict[str, Spec], files: dict[str, tuple[Piece, ...]]) -> None:
    """A manifest is a promise: nothing is committed of which a row is missing."""
    rows = Counter({name: spec.rows for name, spec in specs.items()})
    for pieces in files.values():
        for piece in pieces:
            rows[piece.name] -= piece.stop - piece.start
    odd = [name for name, left in rows.items() if left]
    assert not odd, f"the ranks' shares don't make up the state: {odd[:3]}"


def _expected(state: TrainState) -> list[Held]:
    """The state as it will be: before its first step, AdamW doesn't have its two tensors a parameter."""
    held = held_state(state.model, state.optimizer)
    if not state.optimizer.state:
        trained = [(n, p) for n, p in state.model.named_parameters() if p.requires_grad]
        held += [hold(f"{OPTIMIZER}/{n}/{key}", p) for n, p in trained for key in ("exp_avg", "exp_avg_sq")]
    return held


def _told_of(trouble: TandemError | None) -> str:
    return f"; the store's last failure: {trouble.failed} ({trouble.got})" if trouble else ""


def _ignore(_: TandemError) -> None:
    """Whoever does not want to be told of failures that pass."""
