"""One driver a run at a time: the lease, and what happens to the driver that lost it.

    runs/RUN/lease/00000003.json      entry 3 of a log (cluster.log): who drives in epoch 3
    runs/RUN/lease/00000003.beat      rewritten by that driver every 5 s, as long as it lives

Whoever creates the next entry is the driver. It may, if the one before has let go, or has died (a
process of this machine: seen at once; any other: its heartbeat stands still for 15 s of our own
monotonic clock; nobody's wall clock is compared with anybody's). A driver that lives is left alone
and told about, unless the user says to take over.

That a heartbeat stands still proves no death. So a lease protects people from mistakes, and what
protects the data is the order of epochs: every driver but the first begins with a fence in the log of
checkpoints (cluster.artifacts), and the one before, should it wake, is refused at its next commit.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from datetime import datetime
from types import TracebackType

from pydantic import ValidationError

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.config import Frozen
from cluster.errors import Conflict, NotFound, StorageError
from cluster.log import Log
from cluster.manifest import Writer
from cluster.process import ProcessName, this_process
from cluster.runs import Run
from cluster.storage import Store

BEAT_EVERY_S = 5.0
SILENT_S = 15.0
LOOK_EVERY_S = 1.0
_STOP_WITHIN_S = 1.0


class Holder(Frozen):
    """Who drives in one epoch. `since` is for people only."""

    nonce: str
    process: ProcessName
    since: datetime


class _Beat(Frozen):
    nonce: str
    count: int
    released: bool = False


class Lease:
    """A lease that is held, until `release`. Made by `acquire`; a context manager."""

    def __init__(self, store: Store, prefix: str, epoch: int, nonce: str) -> None:
        self.epoch = epoch
        """Counts the drivers of the run, from 1."""
        self._store = store
        self._log = Log(store, prefix)
        self._prefix = prefix
        self._nonce = nonce
        self._count = 0
        self._lost = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._beat_for_ever, name="lease", daemon=True)

    @property
    def lost(self) -> bool:
        """Whether another driver has taken over, as far as the heartbeat has noticed."""
        return self._lost.is_set()

    def check(self) -> None:
        """Raise if the lease was lost.

        Raises:
            Conflict: another driver has taken over.
        """
        if self.lost:
            raise Conflict(
                f"another driver took this run over: '{self._prefix}'",
                got=f"epoch {self.epoch}, and a newer one",
                fix="nothing is lost: the other driver goes on where this one was",
            )

    def start(self) -> None:
        """Beat in a thread until `release`."""
        self._thread.start()

    def beat(self) -> None:
        """Renew the lease, and see whether it still is ours. A store out of reach changes nothing."""
        self._count += 1
        try:
            self._write(_Beat(nonce=self._nonce, count=self._count))
            if self._store.size_bytes(self._log.key(self.epoch + 1)) is not None:
                self._lost.set()
        except StorageError:
            return

    def release(self) -> None:
        """Let the next driver in at once. If the store is out of reach, it will have to wait a little."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(_STOP_WITHIN_S)
        try:
            self._write(_Beat(nonce=self._nonce, count=self._count + 1, released=True))
        except StorageError:
            return

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _beat_for_ever(self) -> None:
        while not (self._stopping.wait(BEAT_EVERY_S) or self.lost):
            self.beat()

    def _write(self, beat: _Beat) -> None:
        self._store.put(_beat_key(self._prefix, self.epoch), beat.model_dump_json().encode())


def acquire(
    run: Run,
    *,
    take_over: bool = False,
    tell: Callable[[str], None] = lambda note: None,
    clock: Clock = SYSTEM_CLOCK,
    process: Callable[[], ProcessName] = this_process,
) -> Lease:
    """Become the run's driver, or say who is.

    Args:
        take_over: become it even if another driver lives.
        tell: is told when there is something to wait for.

    Raises:
        Conflict: another driver lives, or was faster.
        StorageError: the store failed.
    """
    prefix = f"{run.prefix}/lease"
    log = Log(run.store, prefix)
    head = log.head()
    if head and not take_over:
        _wait_until_free(run, head, _holder(log, head), tell, clock)
    nonce = secrets.token_hex(8)
    entry = Holder(nonce=nonce, process=process(), since=clock.wall())
    epoch = head + 1
    if not log.try_append(epoch, entry.model_dump_json(indent=1).encode()):
        raise _refused(run, _holder(log, epoch), "was faster")
    if head:
        run.checkpoints().fence(Writer(epoch=epoch, generation=0))
    lease = Lease(run.store, prefix, epoch, nonce)
    lease.beat()
    lease.start()
    return lease


def _wait_until_free(
    run: Run, epoch: int, holder: Holder | None, tell: Callable[[str], None], clock: Clock
) -> None:
    """Return when the driver of `epoch` has let go or died, or its heartbeat has stood still for 15 s.

    Raises:
        Conflict: it lives.
    """
    prefix = f"{run.prefix}/lease"
    first = _read_beat(run.store, prefix, epoch)
    if (first is not None and first.released) or (holder is not None and holder.process.is_gone()):
        return
    tell(
        f"run '{run.name}' had another driver ({_described(holder)}): waiting {SILENT_S:g} s for a sign of it"
    )
    began_s = clock.monotonic_s()
    while clock.monotonic_s() - began_s < SILENT_S:
        clock.sleep(LOOK_EVERY_S)
        beat = _read_beat(run.store, prefix, epoch)
        if beat is not None and beat.released:
            return
        if beat != first:
            raise _refused(run, holder, "lives")


def _refused(run: Run, holder: Holder | None, why: str) -> Conflict:
    return Conflict(
        f"run '{run.name}' has a driver, which {why}: {_described(holder)}",
        got=f"a second driver, {this_process()}",
        allowed="one driver a run",
        fix=f"follow it: tandem logs {run.name} --follow; end it first to continue here, or --take-over",
    )


def _described(holder: Holder | None) -> str:
    if holder is None:
        return "an unknown process"
    return f"{holder.process}, since {holder.since:%Y-%m-%d %H:%M:%S} UTC"


def _holder(log: Log, epoch: int) -> Holder | None:
    """None where the entry can't be read: whoever it was, its heartbeat tells whether it lives."""
    try:
        return Holder.model_validate_json(log.read(epoch))
    except (ValidationError, NotFound):
        return None


def _read_beat(store: Store, prefix: str, epoch: int) -> _Beat | None:
    try:
        return _Beat.model_validate_json(store.get(_beat_key(prefix, epoch)))
    except (ValidationError, NotFound):
        return None


def _beat_key(prefix: str, epoch: int) -> str:
    return f"{prefix}/{epoch:08d}.beat"
