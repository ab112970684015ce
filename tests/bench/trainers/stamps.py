"""When each step began, written down by the processes that take the steps, on both sides alike.

One file a process, one JSON line a step. The clock is the monotonic one, which all processes of a
machine share. A step counts as finished when the next one begins.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Stamp:
    """A step began."""

    pid: int
    rank: int
    number: int
    """How many the process had begun, this one included."""
    at_s: float
    step: int | None = None
    """How many steps of the training were done before, where the process can know."""


class Stamps:
    """Writes those of this process."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._rank = rank
        self._number = 0
        self._pid = os.getpid()
        self._file = (folder / f"{self._pid}.jsonl").open("a", buffering=1)

    def begin(self, step: int | None = None) -> None:
        """A step begins now."""
        self._number += 1
        stamp = Stamp(self._pid, self._rank, self._number, time.monotonic(), step)
        self._file.write(json.dumps(asdict(stamp)) + "\n")


def read_stamps(folder: Path) -> list[Stamp]:
    """All of them, in order of time; a line that is being written is left for the next look."""
    found = []
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().split("\n")[:-1]:
            found.append(Stamp(**json.loads(line)))
    return sorted(found, key=lambda stamp: stamp.at_s)
