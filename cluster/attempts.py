"""Who writes artifacts, attempt by attempt, in the order in which writers replace one another.

The name of an attempt is a part of its files' keys. It says who made it, so that whoever cleans up
knows whether it can still become an artifact: one that is older than what stands in the log can't.
"""

from __future__ import annotations

import re
from functools import total_ordering
from typing import NamedTuple

from pydantic import Field

from cluster.config import Frozen

_NAME = re.compile(r"(\d{1,9})-(\d{1,9})-(\d{1,9})-([0-9a-z]+)")


@total_ordering
class Writer(Frozen):
    """Who writes: worker group `generation` of the run's driver `epoch` (cluster.lease)."""

    epoch: int = Field(ge=0)
    generation: int = Field(ge=0)

    def __lt__(self, other: Writer) -> bool:
        return (self.epoch, self.generation) < (other.epoch, other.generation)

    def __str__(self) -> str:
        return f"driver {self.epoch}, generation {self.generation}"


FIRST_WRITER = Writer(epoch=0, generation=0)
"""Who is taken to have written a manifest that names no writer."""


class Attempt(NamedTuple):
    """One attempt at an artifact. The attempts of one writer take turns, which are counted."""

    writer: Writer
    turn: int
    word: str = "0"
    """Of digits and small letters; tells apart what should not but might have the same turn."""

    @property
    def name(self) -> str:
        """As it stands in keys."""
        return f"{self.writer.epoch}-{self.writer.generation}-{self.turn}-{self.word}"

    @classmethod
    def parse(cls, name: str) -> Attempt | None:
        """The attempt of that name; None where the name says nothing."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        epoch, generation, turn = map(int, match.groups()[:3])
        return cls(Writer(epoch=epoch, generation=generation), turn, match[4])

    def is_before(self, other: Attempt) -> bool:
        """Whether it was over when the other one began."""
        return (self.writer, self.turn) < (other.writer, other.turn)
