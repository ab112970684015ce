"""A run of `paced_task:PacedTask` that something is done to: followed from outside, then accounted for.

What is measured comes from two sources: the run's events, and the line that each training process writes
at the beginning of each step (`recording_task`).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paced_task import HURRY
from recording_task import write_line

from cluster.events import read_events
from cluster.runs import Run
from cluster.storage import open_store
from training.data.audit import audit
from training.progress import Progress
from training.recipe import Recipe

ROWS, BATCH, EPOCHS = 512, 64, 60
STEPS = EPOCHS * ROWS // BATCH
PATIENCE_S = 90.0


@dataclass(frozen=True)
class Account:
    """What a fault cost."""

    noticed_s: float
    """From the fault until an event tells of it."""
    next_step_s: float
    """From the fault until the first step of the next generation."""
    steps_redone: int
    """Begun more than once, over the whole run; one that was under way at the fault counts."""
    missing: int
    """Rows, over the whole run."""
    repeated: int

    def __str__(self) -> str:
        return (
            f"noticed after {self.noticed_s:.1f} s, next step after {self.next_step_s:.1f} s, "
            f"{self.steps_redone} steps redone, {self.missing} rows missing, {self.repeated} repeated"
        )


class FaultyRun:
    """One run: `recipe` is what to train, `notes` what people are told."""

    def __init__(self, folder: Path, **changes: object) -> None:
        self.log = folder / "log"
        self.log.mkdir(exist_ok=True)
        fields: dict[str, object] = {
            "model": "line",
            "task": "paced_task:PacedTask",
            "options": {"log_dir": str(self.log)},
            "data": {
                "train": write_line(folder / "train", ROWS),
                "eval": write_line(folder / "eval", 50),
                "label": "y",
            },
            "store": str(folder / "store"),
            "run": "r",
            "optimization": {"global_batch_size": BATCH, "epochs": EPOCHS, "learning_rate": 0.01},
            "checkpoint": {"every_s": None, "every_steps": 20},
        }
        self.recipe = Recipe.model_validate(fields | changes)
        self.run = Run(open_store(self.recipe.store), "r")
        self.notes: list[str] = []
        self.struck_at = ""

    def show(self, progress: Progress) -> None:
        """Takes the notes of a driver."""
        if progress.note:
            self.notes.append(progress.note)

    def meanwhile(self, act: Callable[[], None]) -> Meanwhile:
        """Do something while the run goes on; afterwards, well or not, the run may hurry."""
        return Meanwhile(self, act)

    def hurry(self) -> None:
        """Steps take no time any more."""
        (self.log / HURRY).touch()

    def strike(self, act: Callable[[], object]) -> None:
        """Do what is called the fault."""
        self.struck_at = _now()
        act()

    def lines(self) -> dict[int, list[str]]:
        """When each step was begun, by the process that made it."""
        return {
            int(file.stem): [
                json.loads(line)[0] for line in file.read_text().splitlines(True) if "\n" in line
            ]
            for file in self.log.glob("*.jsonl")
        }

    def await_steps(self, more: int) -> None:
        """Until some process has made so many more steps."""
        before = {pid: len(lines) for pid, lines in self.lines().items()}
        await_true(
            lambda: any(len(lines) >= before.get(pid, 0) + more for pid, lines in self.lines().items()),
            f"{more} steps more",
        )

    def events(self, name: str) -> list[dict[str, Any]]:
        """Those of one kind, in order."""
        return [event for event in read_events(self.run.store, self.run.prefix) if event["event"] == name]

    def await_event(self, name: str, **fields: Any) -> dict[str, Any]:
        """Until there is such an event since the fault; the event."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            found[:] = [
                e
                for e in self.events(name)
                if e["at"] >= self.struck_at and all(e[key] == value for key, value in fields.items())
            ]
            return bool(found)

        await_true(look, f"{name} {fields}")
        return found[0]

    def seconds_since_fault(self, at: str) -> float:
        """Of an event's time."""
        return _seconds(self.struck_at, at)

    def steps_begun(self) -> int:
        """How often a step was begun, over all attempts: of each, as many as the rank that began the most."""
        starts = self.events("attempt-started")
        lines = self.lines()
        begun: dict[str, int] = {}
        for start in starts:
            later = [e["at"] for e in starts if e["pid"] == start["pid"] and e["at"] > start["at"]]
            mine = [at for at in lines.get(start["pid"], ()) if start["at"] <= at < min(later, default="9")]
            begun[start["attempt"]] = max(begun.get(start["attempt"], 0), len(mine))
        return sum(begun.values())

    def account(self, noticed_by: str) -> Account:
        """What the fault cost, once the run is over.

        Args:
            noticed_by: the kind of the event that first tells of it.
        """
        noticed = next(e for e in self.events(noticed_by) if e["at"] >= self.struck_at)
        # Not the generation's own event, which may have been written by a process that was lost.
        starts = [e for e in self.events("attempt-started") if e["at"] >= self.struck_at]
        following = min(start["at"] for start in starts)
        first = min(at for lines in self.lines().values() for at in lines if at >= following)
        found = audit(self.run)
        assert not found.problems, found.problems
        return Account(
            self.seconds_since_fault(noticed["at"]),
            self.seconds_since_fault(first),
            self.steps_begun() - found.step,
            sum(epoch.missing_rows for epoch in found.epochs),
            sum(epoch.repeated_rows for epoch in found.epochs),
        )


class Meanwhile:
    """A thread whose failure is the test's."""

    def __init__(self, run: FaultyRun, act: Callable[[], None]) -> None:
        self._run = run
        self._act = act
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._thread.join(PATIENCE_S)
        if self._error is not None:
            raise self._error from error
        assert not self._thread.is_alive(), "what was to be done meanwhile isn't done"

    def _work(self) -> None:
        try:
            self._act()
        except BaseException as error:
            self._error = error
        finally:
            self._run.hurry()


def await_true(true: Callable[[], bool], what: str) -> None:
    """Wait for something that has to come within `PATIENCE_S`."""
    give_up_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < give_up_s, f"waited too long for {what}"
        time.sleep(0.05)


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _seconds(start: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
