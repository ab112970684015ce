"""Folders for rows that don't fit memory: gone with what they are for, or, where a process was killed, later.

Each has a file that its process holds locked. Whoever makes a new one removes those whose lock nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import IO

_PREFIX = "tandem-trees-"
_LOCK = "lock"


class Scratch:
    """One folder, `path`, on this machine's disk for temporary files."""

    def __init__(self) -> None:
        _sweep(Path(tempfile.gettempdir()))
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
        # Locked before it has its name: an unlocked file of that name belongs to nobody.
        unnamed = self.path / "new"
        self._lock = unnamed.open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        unnamed.rename(self.path / _LOCK)

    def remove_with(self, owner: object) -> None:
        """Remove it as soon as `owner` is no more."""
        weakref.finalize(owner, _remove, self.path, self._lock)


def _remove(folder: Path, lock: IO[bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()


def _sweep(place: Path) -> None:
    for lock in place.glob(f"{_PREFIX}*/{_LOCK}"):
        with contextlib.suppress(OSError), lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.parent, ignore_errors=True)
