"""Cron expressions, as Kubernetes' CronJob and KubeRay's RayCronJob read them: five fields or a macro.

Both use the same parser with the same options, so one check holds for both. Seconds, `L`, `W` and a time zone
inside the expression are refused by the one or the other.
"""

from __future__ import annotations

import re

_MACROS = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of the week", 0, 6, _DAYS),
)
_PART = re.compile(r"(?P<low>\*|\?|\w+)(-(?P<high>\w+))?(/(?P<step>[0-9]+))?")


def checked_cron(text: str) -> str:
    """`text` itself, if it is a cron expression.

    Raises:
        ValueError: saying which field is wrong.
    """
    fields = text.split()
    if text in _MACROS:
        return text
    if len(fields) != len(_FIELDS):
        raise ValueError(f"five fields (minute hour day month weekday) or one of {', '.join(_MACROS)}")
    for field, (name, low, high, words) in zip(fields, _FIELDS, strict=True):
        for part in field.split(","):
            if not _fits(part, low, high, words):
                raise ValueError(f"{low} to {high}, `*`, A-B or */N as the {name}, not {part!r}")
    return text


def _fits(part: str, low: int, high: int, words: tuple[str, ...]) -> bool:
    found = _PART.fullmatch(part)
    if found is None or (found["step"] is not None and int(found["step"]) == 0):
        return False
    if found["low"] in ("*", "?"):
        return found["high"] is None
    first = _number(found["low"], low, words)
    last = _number(found["high"] or found["low"], low, words)
    return first is not None and last is not None and low <= first <= last <= high


def _number(text: str, low: int, words: tuple[str, ...]) -> int | None:
    if text.lower() in words:
        return words.index(text.lower()) + low
    return int(text) if text.isascii() and text.isdigit() else None
