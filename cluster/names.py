"""The one pattern for names of models, runs and aliases.

A name becomes part of an object key, a URL path, a Prometheus label and a Kubernetes label, so
it is what all of these allow: nothing to escape, nothing to normalise, no `..`.
"""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

from pydantic import AfterValidator

from cluster.errors import BadName, shown

PATTERN = r"[a-z0-9][a-z0-9._-]{0,62}"
_NAME = re.compile(PATTERN)


def check_name(name: str, what: str = "name") -> str:
    """`name` itself, if it follows the pattern.

    Raises:
        BadName: it doesn't.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        raise BadName(
            f"the {what} can't be used",
            got=shown(name),
            allowed=f"1 to 63 characters of {PATTERN}, without '..'",
            fix="use lower-case letters, digits, '.', '_' and '-'",
        )
    return name


def _pydantic_check(name: str) -> str:
    try:
        return check_name(name)
    except BadName as error:
        raise ValueError(f"must be {error.allowed}") from None


Name = Annotated[str, AfterValidator(_pydantic_check)]
"""A pydantic field type: a string that follows the pattern."""


class ModelRef(NamedTuple):
    """`digits@live` (an alias) or `digits@7` (a version)."""

    model: str
    alias: str

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Read `MODEL@ALIAS`; a bare `MODEL` means `MODEL@live`.

        Raises:
            BadName: either part is outside the pattern.
        """
        model, at, alias = text.partition("@")
        return cls(check_name(model, "model"), check_name(alias, "alias") if at else "live")

    def __str__(self) -> str:
        return f"{self.model}@{self.alias}"

    @property
    def version(self) -> int | None:
        """The version number, if this names a version rather than an alias."""
        return int(self.alias) if self.alias.isdigit() else None
