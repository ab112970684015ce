"""What the ranks tell one another about a checkpoint, through the group's key-value store.

Each rank *reports*: its files are in the store, or why not. Rank 0 gathers the reports and gives the
*verdict*: committed, or given up and why. Nobody waits in a collective, so a rank whose upload fails
is heard at once, and a rank that is gone costs a deadline and no more.

Asks every few milliseconds instead of waiting inside the store's client: a thread that waits there can't
be told to stop, and holds the client's lock.

Knows nothing of tensors, nor of how files are put.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch._C._distributed_c10d import Store  # torch.distributed's own, where it is typed

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.config import Frozen
from cluster.errors import Conflict, StorageError, TandemError, shown
from cluster.manifest import FileEntry
from training.checkpoints.pieces import Piece

_FIRST_PAUSE_S = 0.005
_LONGEST_PAUSE_S = 0.1

T = TypeVar("T")
F = TypeVar("F", bound=Frozen)


class Told(Frozen):
    """An error as it is told to other ranks."""

    is_conflict: bool
    failed: str
    got: str
    allowed: str
    fix: str

    @classmethod
    def of(cls, error: TandemError) -> Told:
        return cls(
            is_conflict=isinstance(error, Conflict),
            failed=error.failed,
            got=error.got,
            allowed=error.allowed,
            fix=error.fix,
        )

    @property
    def error(self) -> TandemError:
        kind = Conflict if self.is_conflict else StorageError
        return kind(self.failed, got=self.got, allowed=self.allowed, fix=self.fix)


class Report(Frozen):
    """What one rank has put into the store for a checkpoint, or why it could not."""

    entries: dict[str, FileEntry] = {}
    pieces: dict[str, tuple[Piece, ...]] = {}
    """By file."""
    trouble: Told | None = None


class Verdict(Frozen):
    """How a checkpoint ended, for every rank."""

    number: int = 0
    trouble: Told | None = None


class Left(Exception):
    """This rank has left the exchange."""


class Exchange:
    """One group's talk about its checkpoints, which are counted from 0.

    Every method raises `StorageError` where the group's store is gone or a deadline is over, and `Left`
    once `close` has been called.
    """

    def __init__(
        self, store: Store | None, name: str, rank: int, world: int, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        assert world == 1 or store is not None, "ranks can't talk without a store"
        self._store = store if world > 1 else None
        self._clock = clock
        self._oldest = 0
        self._name = name
        self._rank = rank
        self._world = world
        self._is_closed = False

    def close(self) -> None:
        """Have whoever waits stop waiting."""
        self._is_closed = True

    def name_attempts(self, mine: str, deadline_s: float) -> str:
        """The word that rank 0 chose to tell this group's attempts from all others."""
        if self._store is None:
            return mine
        if self._rank == 0:
            self._set("word", mine)
            return mine
        self._wait_for(["word"], deadline_s)
        return self._get(["word"])[0].decode()

    def report(self, count: int, report: Report) -> None:
        """Tell rank 0 about this rank's share of checkpoint `count`."""
        if self._store is not None:
            self._set(f"{count}/{self._rank}", report.model_dump_json())
            if report.trouble is not None:
                self._set(f"{count}/trouble", report.trouble.model_dump_json())

    def gather(self, count: int, own: Report, deadline_s: float) -> list[Report]:
        """Rank 0: every rank's report.

        Raises:
            StorageError: a rank's share could not be put, or it said nothing by the deadline.
        """
        if own.trouble is not None:
            raise own.trouble.error
        if self._store is None:
            return [own]
        keys = [f"{count}/{rank}" for rank in range(1, self._world)]
        self._wait_for(keys, deadline_s, unless=f"{count}/trouble")
        reports = [own, *(_parsed(Report, data) for data in self._get(keys))]
        for report in reports:  # the last to report may be the one that failed
            if report.trouble is not None:
                raise report.trouble.error
        self._forget_before(count)
        return reports

    def announce(self, count: int, verdict: Verdict) -> None:
        """Rank 0: tell all how checkpoint `count` ended."""
        if self._store is not None:
            self._set(f"{count}/verdict", verdict.model_dump_json())

    def hear(self, count: int, deadline_s: float) -> Verdict:
        """Other ranks: how checkpoint `count` ended."""
        self._wait_for([f"{count}/verdict"], deadline_s)
        return _parsed(Verdict, self._get([f"{count}/verdict"])[0])

    def _forget_before(self, count: int) -> None:
        """Drop what was said of earlier checkpoints: who reports on this one has done with them."""
        for earlier in range(self._oldest, count):
            for what in ("verdict", "trouble", *map(str, range(self._world))):
                self._delete(f"{earlier}/{what}")
        self._oldest = count

    def _wait_for(self, keys: Sequence[str], deadline_s: float, unless: str | None = None) -> None:
        """Until all keys are there.

        Raises:
            StorageError: `unless` is there, and says why; or the deadline is over.
        """
        pause_s = _FIRST_PAUSE_S
        while not self._has(keys):
            if unless is not None and self._has([unless]):
                raise _parsed(Told, self._get([unless])[0]).error
            if self._clock.monotonic_s() > deadline_s:
                raise StorageError(
                    "not all workers put their share of a checkpoint into the store in time",
                    got=f"nothing from {self._silent(keys)}",
                    allowed="every worker's share within checkpoint.retry_s",
                    fix="nothing: training goes on, and the next checkpoint tries again",
                )
            self._clock.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _silent(self, keys: Sequence[str]) -> str:
        ranks = [key.rpartition("/")[2] for key in keys if not self._has([key])]
        return "rank " + ", ".join(ranks[:8]) if ranks and ranks[0].isdecimal() else "rank 0"

    def _has(self, keys: Sequence[str]) -> bool:
        return self._call(lambda store: store.check([self._key(key) for key in keys]))

    def _get(self, keys: Sequence[str]) -> list[bytes]:
        return self._call(lambda store: [store.get(self._key(key)) for key in keys])

    def _set(self, key: str, value: str) -> None:
        self._call(lambda store: store.set(self._key(key), value))

    def _delete(self, key: str) -> None:
        self._call(lambda store: store.delete_key(self._key(key)))

    def _key(self, key: str) -> str:
        return f"{self._name}/{key}"

    def _call(self, ask: Callable[[Store], T]) -> T:
        if self._is_closed:
            raise Left
        assert self._store is not None
        try:
            return ask(self._store)
        except RuntimeError as error:  # torch's DistError
            raise StorageError(
                "the group broke up while a checkpoint was being committed",
                got=shown(str(error).split("\n", 1)[0]),
                fix="nothing: the next group of workers saves again",
            ) from None


def _parsed(kind: type[F], data: bytes) -> F:
    return kind.model_validate_json(data)
