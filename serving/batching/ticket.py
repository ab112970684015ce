"""A request as the queue knows it, its part of a batch, and what its priority means.

There are three levels, numbered as Triton numbers them: 1 is the highest, 2 is what a request has that
doesn't say, 3 the lowest. Levels share the model in the proportion of their weights, 16 : 4 : 1, as long as
all of them have work waiting; what one doesn't use goes to the others. So a higher level is served first
when there isn't time for all, and the lowest still gets a share however long that lasts. Within a level, the
earliest deadline is first.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

from serving.batching.latency import LatencyModel

HIGHEST, NORMAL, LOWEST = 1, 2, 3
WEIGHTS: dict[int, int] = {HIGHEST: 16, NORMAL: 4, LOWEST: 1}
"""The share of each level while all have work waiting."""


class Group(Protocol):
    """Whose requests may share a batch: compared by identity."""

    latency: LatencyModel


@dataclass(slots=True, eq=False)
class Ticket:
    """One request in the queue."""

    rows: int
    deadline_s: float
    group: Group
    length: int = 0
    """Elements of one row in the inputs that may be padded; 0 where all rows have one size."""
    shape: Hashable = None
    """What must be equal for requests to share a batch, lengths aside."""
    octave: int | None = None
    """The class of its length, of which neighbours may share a batch; None where nothing is padded."""
    level: int = NORMAL
    arrived_s: float = 0.0
    payload: Any = None
    """The caller's own."""
    probe: bool = False
    """Run to learn how long it takes, whatever the latency model says."""
    planned_rows: int = 0
    """Rows that batches cut so far have taken, from the first on."""
    done: bool = False
    """Cancelled, dropped or wholly planned: it no longer waits."""
    cell: int = field(default=0, repr=False)
    order: int = field(default=0, repr=False)

    @property
    def waiting_rows(self) -> int:
        """Rows that no batch has taken yet."""
        return self.rows - self.planned_rows


@dataclass(slots=True)
class Part:
    """Rows `start` to `stop` of a ticket, as they stand in a batch."""

    ticket: Ticket
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """How many rows."""
        return self.stop - self.start


@dataclass(slots=True)
class Plan:
    """What to run now, and who can no longer be answered in time. `batch` is empty where nothing waits."""

    batch: list[Part] = field(default_factory=list)
    dropped: list[Ticket] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows in the batch."""
        return sum(part.rows for part in self.batch)

    @property
    def length(self) -> int:
        """Elements of one padded row."""
        return max((part.ticket.length for part in self.batch), default=0)
