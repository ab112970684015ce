"""Large graphs on a node's disk, prepared for loading, once for all replicas of the node.

Weights that are mapped from a file are in memory once, however many processes map them; weights that each
replica reads into memory of its own are there as often as there are replicas. So a large graph is fetched,
verified and prepared (`serving.runtimes.prepare`) by whichever replica comes first, and mapped by all.

    FOLDER/KEY/             a prepared graph; complete, because it was renamed into place
    FOLDER/KEY.tmp/         one that is being made, or was when its maker was killed
    FOLDER/KEY.lock         held exclusively to make or delete it, shared while a replica uses it

The kernel lets go of a killed process's locks, so nothing of this can be left locked. What was used longest
ago goes when there is no room; what is in use stays. Knows nothing of ONNX or stores.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from cluster.clock import SYSTEM_CLOCK, Clock

logger = logging.getLogger("tandem.serving")

_LOCK, _MAKING = ".lock", ".tmp"
_POLL_S = 0.05


class Held:
    """A prepared graph that stays until `release`."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self._lock: int | None = lock

    def release(self) -> None:
        """Let it go; it may be deleted from here on. A second call does nothing."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class NodeCache:
    """Folders by key, on one disk, within a number of bytes. Safe to use from several processes.

    Args:
        folder: its own.
        limit_bytes: how much all entries may take together, those in use included.
    """

    def __init__(self, folder: Path, limit_bytes: int, clock: Clock = SYSTEM_CLOCK) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._clock = clock
        self.hits = self.misses = 0
        """How often an entry was there already, and how often it wasn't, in this process."""

    def hold(
        self, key: str, make: Callable[[Path], None], *, needs_bytes: int, deadline_s: float = 600.0
    ) -> Held:
        """The entry `key`, made by `make(folder)` if it isn't there; waits while another process makes it.

        Args:
            key: a name that says everything that the entry depends on.
            needs_bytes: what it will take, roughly.
            deadline_s: how long to wait for another's work.

        Raises:
            OSError: there is no room, or the disk fails.
            TimeoutError: another process is still at it.
            Whatever `make` raises; nothing is left of it then.
        """
        lock = os.open(self._folder / f"{key}{_LOCK}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            entry = self._folder / key
            self._wait_for(lock, fcntl.LOCK_SH, deadline_s)
            if entry.is_dir():
                self.hits += 1
            else:
                self.misses += 1
                self._wait_for(lock, fcntl.LOCK_EX, deadline_s)
                if not entry.is_dir():
                    self._make(key, make, needs_bytes)
                # Not in one step: another process may delete the entry in between, so it is looked at again.
                fcntl.flock(lock, fcntl.LOCK_SH)
                if not entry.is_dir():
                    raise FileNotFoundError(f"{entry} was deleted as soon as it was made: too little room")
            os.utime(entry)
        except BaseException:
            os.close(lock)
            raise
        return Held(entry, lock)

    def sizes_bytes(self) -> dict[str, int]:
        """What each entry takes, those that are being made included."""
        return {path.name: _size_bytes(path) for path in self._folder.iterdir() if path.is_dir()}

    def _make(self, key: str, make: Callable[[Path], None], needs_bytes: int) -> None:
        making = self._folder / f"{key}{_MAKING}"
        shutil.rmtree(making, ignore_errors=True)
        self._make_room(needs_bytes)
        making.mkdir(mode=0o700)
        try:
            make(making)
            making.rename(self._folder / key)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise

    def _wait_for(self, lock: int, kind: int, deadline_s: float) -> None:
        """Take a lock, asking again and again, since the kernel's own wait has no deadline.

        A lock that is held already is lost where the other kind can't be had, so two that both want to
        make an entry don't wait for each other.
        """
        end_s = self._clock.monotonic_s() + deadline_s
        while True:
            try:
                fcntl.flock(lock, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if self._clock.monotonic_s() > end_s:
                    raise TimeoutError(f"another process is at it for more than {deadline_s:.0f} s") from None
                self._clock.sleep(_POLL_S)
            else:
                return

    def _make_room(self, needs_bytes: int) -> None:
        """Delete what was used longest ago and isn't in use.

        Raises:
            OSError: that doesn't suffice.
        """
        sizes = self.sizes_bytes()
        free = min(self._limit_bytes - sum(sizes.values()), shutil.disk_usage(self._folder).free)
        for name in sorted(sizes, key=self._used_at):
            if free >= needs_bytes:
                return
            if self._delete(name):
                free += sizes[name]
        if free < needs_bytes:
            raise OSError(f"{self._folder} has room for {free} bytes, {needs_bytes} are needed")

    def _used_at(self, name: str) -> float:
        with contextlib.suppress(FileNotFoundError):
            return (self._folder / name).stat().st_mtime
        return 0.0

    def _delete(self, name: str) -> bool:
        """Delete an entry unless it is in use or being made."""
        key = name.removesuffix(_MAKING)
        with _try_lock(self._folder / f"{key}{_LOCK}") as locked:
            if not locked:
                return False
            logger.info("the prepared graph %s makes room for another", name)
            shutil.rmtree(self._folder / name, ignore_errors=True)
            return True


@contextlib.contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    else:
        yield True
    finally:
        os.close(lock)


def _size_bytes(folder: Path) -> int:
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for path in folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_blocks * 512
    return total
