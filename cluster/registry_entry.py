"""What one entry of a model's log says: a version registered or an alias moved, and all that stands after it.

Entries are read by other releases than the one that wrote them, so fields are only ever added, and what
is None is left out. Knows nothing of stores, nor of which entry may follow which (`cluster.registry`).
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal, NamedTuple

from pydantic import ValidationError

from cluster.config import Frozen
from cluster.errors import Damaged, shown
from cluster.trial import Trial

Action = Literal["register", "promote", "rollback", "canary", "shadow", "advance", "abandon"]


class Version(Frozen):
    """An immutable version of a model: where its servable is, and what the gate measured."""

    model: str
    version: int
    manifest_key: str
    manifest_sha256: str
    run: str
    metrics: dict[str, float]
    entry: int
    """The number of the log entry that registered it."""


class Target(Frozen):
    """What an alias points at, the entry that pointed it there, and the entry to roll back to."""

    version: int
    entry: int
    before: int | None = None
    trial: Trial | None = None
    """The candidate that is tried beside it; moving the alias ends that."""


class Entry(Frozen):
    """One entry of a model's log."""

    number: int
    nonce: str
    action: Action
    model: str
    who: str
    why: str
    at: datetime
    version: Version
    """The version registered, or the one that the alias points at from here on."""
    alias: str | None = None
    aliases: dict[str, Target]
    """Every alias as it stands after this entry."""
    versions: int
    """How many versions exist after this entry; they are numbered from 1."""


class Change(NamedTuple):
    """What one entry changes."""

    action: Action
    version: Version
    versions: int
    aliases: dict[str, Target]
    alias: str | None = None


def parsed(data: bytes, model: str, number: int) -> Entry:
    """Entry `number` of a model's log, from its bytes.

    Raises:
        Damaged: they aren't an entry.
    """
    try:
        return Entry.model_validate_json(data)
    except ValidationError as error:
        raise Damaged(
            f"entry {number} of the log of model '{model}' can't be understood",
            got=shown(str(error.errors()[0]["msg"])),
            fix="it was changed after it was written: restore it",
        ) from None
