"""The replicas of one kind, as the simulator sees them: how many are up, and when their batches end.

A batch of n rows takes a + b*n. Replicas of a kind are alike, so they are counted rather than kept one by
one: a step that starts the same batch on a thousand free replicas is one entry in the heap. Knows nothing
of policies. All times are whole ticks of the simulator's grid.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """What one replica of a kind can do, and what it costs.

    Args:
        base_s: seconds that any batch takes.
        row_s: seconds more for each row.
        max_batch: rows run at once.
        slots: batches run at the same time.
        cold_start_s: the mean time from the decision to the first request it can take.
        spread: the standard deviation of the logarithm of the cold start.
        cost_per_hour: of one replica.
    """

    base_s: float
    row_s: float
    max_batch: int
    slots: int = 1
    cold_start_s: float = 10.0
    spread: float = 0.2
    cost_per_hour: float = 1.0

    def batch_s(self, rows: int) -> float:
        """How long a batch takes."""
        return self.base_s + self.row_s * rows

    def rows_within(self, slo_s: float) -> int:
        """The largest batch that ends within `slo_s` behind one of its own size; at least 1."""
        rows = self.max_batch
        while rows > 1 and 2 * self.batch_s(rows) > slo_s:
            rows -= 1
        return rows

    def capacity_s(self, slo_s: float) -> float:
        """Rows a second that it can keep up with and answer in time."""
        rows = self.rows_within(slo_s)
        return self.slots * rows / self.batch_s(rows)


class Pool:
    """The replicas of one kind at one moment."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.ready = 0
        self.busy_slots = 0
        self.running_rows = 0
        self.starting: list[int] = []
        """When those that start are ready, as a heap."""
        self._ends: list[tuple[int, int, int]] = []
        """(when, slots, rows) of batches, as a heap."""

    @property
    def free_slots(self) -> int:
        """Batches that could start now."""
        return max(0, self.ready * self.kind.slots - self.busy_slots)

    @property
    def replicas(self) -> int:
        """Those that are paid for: ready, starting, and told to stop but still at a batch."""
        return max(self.ready, -(-self.busy_slots // self.kind.slots)) + len(self.starting)

    @property
    def next_event(self) -> int | None:
        """When something of it changes next."""
        ends = self._ends[0][0] if self._ends else None
        starts = self.starting[0] if self.starting else None
        return min((at for at in (ends, starts) if at is not None), default=None)

    def begin(self, now: int, ends: int, slots: int, rows: int) -> None:
        """Run batches on `slots` slots until `ends`."""
        self.busy_slots += slots
        self.running_rows += rows
        heapq.heappush(self._ends, (ends, slots, rows))

    def advance(self, now: int) -> None:
        """Let what is due happen: batches end, replicas become ready."""
        while self._ends and self._ends[0][0] <= now:
            _, slots, rows = heapq.heappop(self._ends)
            self.busy_slots -= slots
            self.running_rows -= rows
        while self.starting and self.starting[0] <= now:
            heapq.heappop(self.starting)
            self.ready += 1

    def start(self, ready_at: int) -> None:
        """Start one replica."""
        heapq.heappush(self.starting, ready_at)

    def stop(self, replicas: int) -> None:
        """Stop so many: those that start first, the latest of them before the others; then ready ones."""
        self.starting.sort()
        cancelled = min(replicas, len(self.starting))
        del self.starting[len(self.starting) - cancelled :]
        self.ready = max(0, self.ready - (replicas - cancelled))
