"""What rank 0 tells people: progress twice a second, and an event for whatever is worth keeping.

Knows nothing of where reports go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cluster.clock import Clock
from cluster.errors import TandemError
from cluster.events import EventWriter
from cluster.manifest import Manifest
from training.checkpoints.checkpoint import CheckpointMeta
from training.loop import StepReport
from training.progress import Progress

REPORT_EVERY_S = 0.5


class Reporter:
    """One generation's. Its `committed` and `not_committed` may be called from any thread.

    Args:
        start: where the generation begins, `checkpoint` being the newest committed one.
    """

    def __init__(
        self, start: Progress, report: Callable[[Progress], None], events: EventWriter, clock: Clock
    ) -> None:
        self._report = report
        self._events = events
        self._clock = clock
        self._newest = start.checkpoint
        self._reported_s = clock.monotonic_s()
        self._window_rows = 0
        self._window_s = self._window_wait_s = 0.0
        self._first: tuple[int, float] | None = None
        self.samples_per_s = 0.0
        """Rows a second over all workers, from the end of this generation's first step."""
        report(start)
        self._progress = replace(start, note="")

    def on_step(self, step: StepReport) -> None:
        """Note a step; report if it is time."""
        now_s = self._clock.monotonic_s()
        self._window_rows += step.global_rows
        self._window_s += step.step_s
        self._window_wait_s += step.data_wait_s
        if self._first is None:
            self._first = (step.cursor, now_s)
            self._events.write("first-step", step=step.step)
        elif now_s > self._first[1]:
            self.samples_per_s = (step.cursor - self._first[0]) / (now_s - self._first[1])
        if step.loss is not None:
            self._progress = replace(self._progress, loss=step.loss)
            rate = self._window_rows / max(self._window_s, 1e-9)
            self._events.write(
                "step", step=step.step, epoch=step.epoch, loss=step.loss, samples_per_s=round(rate, 3)
            )
        last = step.step == self._progress.total_steps
        if now_s - self._reported_s >= REPORT_EVERY_S or last:
            self._say_where(step, now_s)

    def say(self, phase: str) -> None:
        """What is being done, when it isn't steps."""
        self._report(replace(self._progress, phase=phase))

    def note(self, text: str) -> None:
        """Something worth a line of its own."""
        self._report(replace(self._progress, note=text))

    def committed(self, manifest: Manifest) -> None:
        """A checkpoint stands."""
        meta = CheckpointMeta.model_validate(manifest.meta)
        size = sum(entry.size_bytes for entry in manifest.files.values())
        self._events.write(
            "checkpoint-committed",
            checkpoint=manifest.number,
            step=meta.step,
            cursor=meta.cursor,
            size_bytes=size,
        )
        self._newest = manifest.number
        self._events.flush()  # so that a run that is killed has told of every checkpoint

    def not_committed(self, error: TandemError) -> None:
        """A checkpoint was given up."""
        self._events.write("checkpoint-failed", why=str(error))
        self.note(f"a checkpoint was not written, training goes on: {error.failed}")

    def _say_where(self, step: StepReport, now_s: float) -> None:
        rate = self._window_rows / max(self._window_s, 1e-9)
        left = self._progress.total_steps - step.step
        self._progress = replace(
            self._progress,
            step=step.step,
            epoch=step.epoch,
            samples_per_s=rate,
            data_wait_share=self._window_wait_s / max(self._window_s, 1e-9),
            eta_s=left * step.global_rows / max(rate, 1e-9),
            checkpoint=self._newest,
        )
        self._report(self._progress)
        self._reported_s = now_s
        self._window_rows, self._window_s, self._window_wait_s = 0, 0.0, 0.0
