"""One broken rule, in the four parts that every error has, and where."""

from __future__ import annotations

from typing import NamedTuple


class Finding(NamedTuple):
    """What is wrong at one place."""

    path: str
    """`KIND/NAME.spec…`."""
    problem: str
    got: str
    allowed: str
    fix: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}: got {self.got}; allowed: {self.allowed}; fix: {self.fix}"
