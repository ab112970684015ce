"""What a trainer and the uploader beside it say to one another: orders, answers, and how long steps take.

Orders and answers are JSON lines; what steps take goes through a pipe of its own, eight bytes each.

Knows neither side. Imports no torch, since the uploader does without.
"""

from __future__ import annotations

import os
import struct
from typing import Literal

from pydantic import Field, TypeAdapter

from cluster.config import Frozen
from cluster.errors import StorageError, TandemError
from cluster.manifest import FileEntry

SLOWDOWN = struct.Struct("=d")
_STEPS_AT_ONCE = 4096


class Source(Frozen):
    """Where in the arena a file's bytes are."""

    name: str
    offset: int = Field(ge=0)
    size_bytes: int = Field(ge=0)


class Upload(Frozen):
    """Put files under `folder/NAME`. A later order takes the place of one that is not done."""

    job: int
    store: str
    """The store's URI."""
    folder: str
    files: tuple[Source, ...]
    retry_s: float
    """Seconds after which a store that fails is not tried again."""
    calm_s: float
    """Seconds that it may take for the steps' sake."""
    mb_per_s: float | None


class Uploaded(Frozen):
    """All files of an order are in the store."""

    saying: Literal["uploaded"] = "uploaded"
    job: int
    entries: dict[str, FileEntry]


class Trouble(Frozen):
    """A put failed; it is tried again if `is_final` is not set, else the order is given up."""

    saying: Literal["trouble"] = "trouble"
    job: int
    is_final: bool
    failed: str
    got: str
    allowed: str
    fix: str

    @classmethod
    def of(cls, job: int, error: TandemError, *, is_final: bool) -> Trouble:
        return cls(
            job=job,
            is_final=is_final,
            failed=error.failed,
            got=error.got,
            allowed=error.allowed,
            fix=error.fix,
        )

    @property
    def error(self) -> StorageError:
        return StorageError(self.failed, got=self.got, allowed=self.allowed, fix=self.fix)


SAYINGS: TypeAdapter[Uploaded | Trouble] = TypeAdapter(Uploaded | Trouble)


class Steps:
    """What the trainer says of its steps: eight bytes each, a slowdown (`Throttle.heard`), in a pipe.

    A pipe apart from the orders', so that no trainer waits to tell: steps go untold where it is full.
    """

    def __init__(self, file: int) -> None:
        self._file = file
        os.set_blocking(file, False)

    def heard(self) -> list[float]:
        """Those since the last time."""
        try:
            data = os.read(self._file, SLOWDOWN.size * _STEPS_AT_ONCE)
        except BlockingIOError:
            return []
        return [slowdown for (slowdown,) in SLOWDOWN.iter_unpack(data)]
