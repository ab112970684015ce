"""Reading from a store that fails for a while: again, with growing pauses, until a deadline.

pyarrow's own retries give up within seconds. What a store refuses for good (no such object, no
right to it) is told at once. Bytes that make no sense are read a few times more, because a
connection that was cut can look like a damaged file; what is damaged in the store stays so.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.errors import Damaged, StorageError
from cluster.retry import retried

T = TypeVar("T")

RETRY_S = 600.0
_DAMAGED_TRIES = 3
_FOR_GOOD = (
    "ACCESS_DENIED",
    "INVALID_ACCESS_KEY",
    "INVALID_CLIENT_TOKEN",
    "SIGNATURE_DOES_NOT_MATCH",
    "NO_SUCH_",
    "RESOURCE_NOT_FOUND",
    "HTTP status 401",
    "HTTP status 403",
    "HTTP status 404",
    "does not exist",
    "No such file",
)


@dataclass(frozen=True)
class Patience:
    """For how long reading is tried again; 0: not at all."""

    retry_s: float = RETRY_S
    clock: Clock = SYSTEM_CLOCK

    def read(self, call: Callable[[], T], given_up: threading.Event | None = None) -> T:
        """What `call` returns, once it does.

        Args:
            given_up: nobody wants it any more: no attempt is made after this is set.

        Raises:
            StorageError: what the last attempt raised.
        """
        damaged = 0

        def transient(error: Exception) -> bool:
            nonlocal damaged
            if given_up is not None and given_up.is_set():
                return False
            if isinstance(error, Damaged):
                damaged += 1
                return damaged < _DAMAGED_TRIES
            return isinstance(error, StorageError) and not any(mark in error.got for mark in _FOR_GOOD)

        return retried(call, transient=transient, retry_s=self.retry_s, clock=self.clock)


IMPATIENT = Patience(0)
