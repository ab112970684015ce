"""CEL rules of CRDs, where `common-expression-language` is installed (it comes with the dev extra)."""

from __future__ import annotations

import importlib.util
from typing import Any


def available() -> bool:
    """Whether rules can be evaluated here."""
    return importlib.util.find_spec("cel") is not None


def holds(rule: str, value: Any) -> bool:
    """Whether `rule` is true of `value`, which it calls `self`.

    Raises:
        RuntimeError, ValueError: the rule can't be evaluated.
    """
    import cel

    return cel.evaluate(rule, {"self": value}) is True
