"""The line of a run that a worker's state lies on: which rows were consumed, and which left out, up to now.

A checkpoint's manifest holds it as the ledger. Rolling back means taking up the line as the checkpoint
recorded it; what came after is then on no line, and counts for nothing.

Pure bookkeeping: the same on every rank, because every rank takes the same steps.
"""

from __future__ import annotations

from cluster.config import Frozen
from training.checkpoints.checkpoint import CheckpointMeta
from training.method import Position


class LineRecord(Frozen):
    """A line as it travels between workers."""

    meta: CheckpointMeta
    skips: dict[int, int]
    newest: int
    """The newest number that the sender knows to be taken in the log of checkpoints."""
    checkpoint: int
    """And of the newest checkpoint."""


class Line:
    """One worker's line through one generation.

    Args:
        meta: where the line stands.
        skips: batches ahead that are to be left out, by cursor: {start: stop}.
        attempt: who consumes from here on, and with how many `workers`.
    """

    def __init__(self, meta: CheckpointMeta, skips: dict[int, int], attempt: str, workers: int) -> None:
        self._meta = meta
        self._skips = skips
        self._attempt = attempt
        self._workers = workers

    @property
    def skips(self) -> dict[int, int]:
        """Batches that are, or were, to be left out, by cursor: {start: stop}."""
        return dict(self._skips)

    @property
    def left_out(self) -> int:
        """How many batches of this line were left out, or will be."""
        done = {segment.start for segment in self._meta.ledger if segment.skipped}
        return len(done | self._skips.keys())

    def is_skipped(self, cursor: int) -> bool:
        """Whether the batch that starts at `cursor` is to be left out."""
        return cursor in self._skips

    def to(self, state: Position, loss: float | None = None) -> CheckpointMeta:
        """The line up to `state`; `loss` is the mean over the steps since the last checkpoint."""
        return self._extended(state.step, state.cursor).model_copy(update={"loss": loss})

    def back_to(self, meta: CheckpointMeta, start: int, stop: int) -> None:
        """Take the line up at an earlier place, and leave out rows [start, stop) when they come."""
        self._meta = meta
        self._skips[start] = stop

    def _extended(self, step: int, cursor: int) -> CheckpointMeta:
        """The line up to `cursor`. What was left out on the way is told by the skips: no step, and no order
        to remember one, stands between a batch that is passed over and the record of it."""
        meta = self._meta
        for start, stop in sorted(self._skips.items()):
            if meta.cursor <= start and stop <= cursor:
                meta = self._by_us(self._by_us(meta, step, start), step, stop, skipped=True)
        return self._by_us(meta, step, cursor)

    def _by_us(
        self, meta: CheckpointMeta, step: int, cursor: int, *, skipped: bool = False
    ) -> CheckpointMeta:
        return meta.extended(
            step=step, cursor=cursor, attempt=self._attempt, workers=self._workers, skipped=skipped
        )
