"""What callers say of answers afterwards, when the truth has come back: `POST /v1/models/NAME:feedback`.

    {"version": "4", "prediction": "cat", "label": "dog"}        wrong: a score of 0
    {"version": "4", "score": 0.8}                               a score of one's own; larger is better
    [{…}, {…}]                                                   several at once

Every answer says which version gave it (`x-model-version`), so a caller sends that back, and any replica
may be told. Nothing is remembered of requests.
"""

from __future__ import annotations

from typing import Any

from cluster.config import Frozen
from cluster.errors import Unprocessable
from serving.protocol.limits import Limits
from serving.protocol.reading import brief, read_json

MAX_AT_ONCE = 10_000
_KEYS = {"version", "score", "prediction", "label"}
_FORM = '{"version": "4", "score": 0.8} or {"version": "4", "prediction": …, "label": …}, or a list of such'


class Feedback(Frozen):
    """How right one answer was."""

    version: str
    score: float


def parse_feedback(body: bytes) -> list[Feedback]:
    """Read a body.

    Raises:
        BadRequest: it isn't JSON.
        Unprocessable: it isn't feedback.
    """
    found = read_json(body, Limits())
    entries = found if isinstance(found, list) else [found]
    if len(entries) > MAX_AT_ONCE:
        raise _refused("too many entries", f"{len(entries)}", f"at most {MAX_AT_ONCE}")
    return [_entry(entry) for entry in entries]


def _entry(entry: Any) -> Feedback:
    if not isinstance(entry, dict) or not isinstance(entry.get("version"), str) or set(entry) - _KEYS:
        raise _refused("an entry can't be understood", brief(entry), _FORM)
    score = entry.get("score")
    if score is None and "prediction" in entry and "label" in entry:
        return Feedback(version=entry["version"], score=float(entry["prediction"] == entry["label"]))
    if isinstance(score, bool) or not isinstance(score, int | float) or abs(score) > 1e9:
        raise _refused("an entry has no score", brief(score), _FORM)
    return Feedback(version=entry["version"], score=float(score))


def _refused(failed: str, got: str, allowed: str) -> Unprocessable:
    return Unprocessable(
        failed, got=got, allowed=allowed, fix="take the version from the answer's x-model-version header"
    )
