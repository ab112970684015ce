"""What waits, by deadline and level: whether all of it can be met, and what one request more would do to it.

Deadlines are put into cells, 64 to the SLO, so a question costs some microseconds however many wait. Cells
hold rows and elements, not seconds: the answer is by the latency known when it is asked.

Pure state. Knows nothing of tickets' order in batches beyond "earliest deadline first within a level, levels
by their weights".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from serving.batching.latency import LatencyModel
from serving.batching.ticket import WEIGHTS, Ticket

CELLS = 64
PADDING_ALLOWED = 1.1
"""What padding is expected to add to the elements of a batch of mixed lengths."""


@dataclass(slots=True)
class Pace:
    """How fast a backlog is worked off, one batch of `batch_rows` after the other on each of `slots`.

    Made for every request that comes, so not frozen: that would take three times as long. Nobody changes it.
    """

    batch_s: float
    row_s: float
    element_s: float
    margin: float
    batch_rows: int
    slots: int = 1
    coming_rows_per_s: float = 0.0
    """Rows that will come meanwhile."""

    @classmethod
    def of(
        cls,
        latency: LatencyModel,
        length: int,
        max_rows: int,
        slo_s: float,
        slots: int = 1,
        coming_rows_per_s: float = 0.0,
    ) -> Pace:
        """The pace of a model, by what it has learned, at about this length."""
        batch_rows = latency.working_rows(max_rows, length, slo_s)
        return cls(*latency.terms_s, latency.margin, batch_rows, slots, coming_rows_per_s)

    def needed_s(self, rows: float, elements: float, starts_in_s: float) -> float:
        """How long until `rows` rows with `elements` elements are done, the last batch with its margin.

        The last batch is filled up by what comes before it starts.

        Args:
            starts_in_s: how long until a slot is free for the first batch.
        """
        row_s = self.row_s + self.element_s * PADDING_ALLOWED * elements / rows
        before = math.ceil(rows / self.batch_rows) - 1
        before_s = before * (self.batch_s + self.batch_rows * row_s) / self.slots
        last_rows = rows - before * self.batch_rows + self.coming_rows_per_s * (starts_in_s + before_s)
        last_s = self.batch_s + min(last_rows, self.batch_rows) * row_s
        return before_s + last_s * (1.0 + self.margin)

    @property
    def row_worth_s(self) -> float:
        """What one row takes of a full batch, elements aside."""
        return (self.batch_s / self.batch_rows + self.row_s) / self.slots


@dataclass(slots=True)
class _Cell:
    rows: int = 0
    elements: int = 0


class Backlog:
    """Rows and elements that wait.

    Args:
        slo_s: the longest time that requests usually have.
    """

    def __init__(self, slo_s: float) -> None:
        self._cell_s = slo_s / CELLS
        self._cells: dict[int, dict[int, _Cell]] = {level: {} for level in WEIGHTS}
        self._totals = {level: _Cell() for level in WEIGHTS}
        self._all = _Cell()

    @property
    def rows(self) -> int:
        """All rows that wait."""
        return self._all.rows

    def add(self, ticket: Ticket) -> None:
        """Count a ticket's rows."""
        ticket.cell = int(ticket.deadline_s / self._cell_s)
        cells = self._cells[ticket.level]
        cell = cells.get(ticket.cell)
        if cell is None:
            cell = cells[ticket.cell] = _Cell()
        for place in (cell, self._totals[ticket.level], self._all):
            place.rows += ticket.rows
            place.elements += ticket.rows * ticket.length

    def remove(self, ticket: Ticket, rows: int) -> None:
        """Some rows of a ticket no longer wait."""
        cells = self._cells[ticket.level]
        cell = cells[ticket.cell]
        for place in (cell, self._totals[ticket.level], self._all):
            place.rows -= rows
            place.elements -= rows * ticket.length
        if cell.rows == 0:
            del cells[ticket.cell]

    def spare_s(self, pace: Pace, now_s: float, start_s: float, new: Ticket) -> float:
        """By how much the tightest deadline is kept if `new` is let in; negative where one would be missed.

        Those are `new`'s own deadline and, in its level, the later ones, which it would push back. Levels
        below give way; the shares of other levels are counted in.

        Args:
            start_s: when the model is free.
        """
        all_rows = self._all.rows + new.rows
        all_elements = self._all.elements + new.rows * new.length
        cells = self._cells[new.level]
        earliest_s = min(cells, default=math.inf) * self._cell_s
        starts_in_s = start_s - now_s
        needed_s = pace.needed_s(all_rows, all_elements, starts_in_s)
        spare_s = min(new.deadline_s, earliest_s) - start_s - needed_s
        if spare_s >= 0:
            return spare_s  # everything is done before anything is due
        own = int(new.deadline_s / self._cell_s)
        before = [index for index in cells if index < own]
        rows = new.rows + sum(cells[index].rows for index in before)
        elements = new.rows * new.length + sum(cells[index].elements for index in before)
        if own in cells:
            rows += cells[own].rows
            elements += cells[own].elements
        needed_s = self._needed_s(pace, new.level, rows, elements, starts_in_s)
        spare_s = new.deadline_s - start_s - needed_s
        for index in sorted(index for index in cells if index > own):
            rows += cells[index].rows
            elements += cells[index].elements
            needed_s = self._needed_s(pace, new.level, rows, elements, starts_in_s)
            spare_s = min(spare_s, index * self._cell_s - start_s - needed_s)
        return spare_s

    def all_met(self, pace: Pace, start_s: float, less_rows: int, level: int) -> bool:
        """Whether all that waits in a level, its first `less_rows` aside, can be met from `start_s` on."""
        rows = -less_rows
        elements = 0.0
        cells = self._cells[level]
        for index in sorted(cells):
            cell = cells[index]
            counted = min(max(rows + cell.rows, 0), cell.rows)
            rows += cell.rows
            elements += cell.elements * counted / cell.rows
            if rows <= 0:
                continue
            # The end of the cell: what is due within it needn't be due at its beginning.
            due_s = (index + 1) * self._cell_s
            if start_s + self._needed_s(pace, level, rows, elements, 0.0) > due_s:
                return False
        return True

    def _needed_s(self, pace: Pace, level: int, rows: float, elements: float, starts_in_s: float) -> float:
        """`Pace.needed_s`, with what other levels take meanwhile by their shares."""
        own_rows = rows
        for other, total in self._totals.items():
            if other != level and total.rows:
                share = min(total.rows, own_rows * WEIGHTS[other] / WEIGHTS[level])
                elements += total.elements * share / total.rows
                rows += share
        return pace.needed_s(rows, elements, starts_in_s)
