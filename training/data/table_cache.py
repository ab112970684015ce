"""Tables that were read last, in memory, up to a number of bytes.

Knows nothing of what is in them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import pyarrow as pa

TableKey = tuple[int, tuple[str, ...]]
"""The index of a row group, and the columns."""


class TableCache:
    """What was read last, up to a number of bytes. Safe to use from several threads."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held_bytes = 0
        self._lock = threading.Lock()
        self._tables: OrderedDict[TableKey, pa.Table] = OrderedDict()

    def get(self, key: TableKey) -> pa.Table | None:
        """What was put under `key`, if it is still there."""
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
            return self._tables.get(key)

    def put(self, key: TableKey, table: pa.Table) -> None:
        """Keep a table, for which those used longest ago go; one above the limit isn't kept."""
        with self._lock:
            if table.nbytes > self._limit_bytes or key in self._tables:
                return
            self._tables[key] = table
            self._held_bytes += table.nbytes
            while self._held_bytes > self._limit_bytes:
                self._held_bytes -= self._tables.popitem(last=False)[1].nbytes
