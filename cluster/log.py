"""An append-only log of numbered objects: `PREFIX/00000001SUFFIX`, `…2`, `…3`.

Entry n is created put-if-absent by a writer that has seen entry n-1, so entries are contiguous,
immutable and totally ordered, and of two racing writers exactly one gets a number. Contiguity is
what lets a reader find the head by probing, in about 2·log2(n) look-ups, with no listing, no
pointer to go stale and no clock.

The registry is such a log; so are a run's checkpoints and servables, whose entries are manifests.
"""

from __future__ import annotations

from collections.abc import Callable

from cluster.errors import Conflict
from cluster.storage import Store

_MAX_LOST_RACES = 64


class Log:
    """One log. `suffix` is what follows the number in a key, such as `.json`."""

    def __init__(self, store: Store, prefix: str, suffix: str = ".json") -> None:
        self._store = store
        self._prefix = prefix.rstrip("/")
        self._suffix = suffix

    def key(self, number: int) -> str:
        """The key of entry `number`, counted from 1."""
        return f"{self._prefix}/{number:08d}{self._suffix}"

    def head(self, known: int = 0) -> int:
        """The number of the newest entry, 0 where there is none; `known` is one that exists."""
        low, step = known, 1
        while self.has(low + step):
            low, step = low + step, step * 2
        high = low + step  # low exists, high doesn't
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.has(middle) else (low, middle)
        return low

    def read(self, number: int) -> bytes:
        """The bytes of an entry.

        Raises:
            NotFound: there is no such entry.
            StorageError: the store can't be read.
        """
        return self._store.get(self.key(number))

    def try_append(self, number: int, data: bytes) -> bool:
        """Create entry `number`; False where another writer has that number."""
        return self._store.put_if_absent(self.key(number), data)

    def append(self, make: Callable[[int, bytes | None], bytes]) -> tuple[int, bytes]:
        """Append what `make(number, previous entry)` gives, anew each time a race is lost.

        Returns:
            The number got, and the bytes written.

        Raises:
            Conflict: 64 races were lost in a row.
            Whatever `make` raises: nothing is written then.
        """
        head = 0
        for _ in range(_MAX_LOST_RACES):
            head = self.head(head)
            data = make(head + 1, self.read(head) if head else None)
            if self.try_append(head + 1, data):
                return head + 1, data
        raise Conflict(
            f"another writer kept winning the next entry of '{self._prefix}'",
            got=f"{_MAX_LOST_RACES} lost races",
            fix="try again; if it persists, run fewer writers at once",
        )

    def has(self, number: int) -> bool:
        """Whether there is an entry `number`.

        Raises:
            StorageError: the store can't be read.
        """
        return self._store.size_bytes(self.key(number)) is not None
