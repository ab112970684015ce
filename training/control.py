"""How a worker, and whoever supervises it from another thread, see one another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

Source = Literal["fresh", "memory", "store"]
"""Where a generation's state came from."""


@dataclass(slots=True)
class Control:
    """Plain fields, each written by one side only; a thread may read them at any time."""

    pause: bool = False
    """Asks rank 0 to let all ranks stop at a step boundary."""
    pause_saves: bool = False
    """And to have a checkpoint of that step committed first."""
    step: int = 0
    """Steps done."""
    progress: int = 0
    """Grows with whatever this worker does by itself."""
    waiting: bool = False
    """Whether it waits for other ranks, as far as it knows."""
    phase: str = "starting"
    on_joined: Callable[[int, Source], None] = field(default=lambda step, source: None)
    """Called once a generation has one state, with its step."""
    on_part: Callable[[], None] = field(default=lambda: None)
    """Set by the worker: makes it stop waiting for ranks that are gone."""
