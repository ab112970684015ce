"""How long a request may take and how urgent it is, as its client says it.

    header   x-request-timeout-seconds: 0.25        seconds, a decimal number
    header   x-request-priority: 1                  1 is the highest, 2 the default, 3 the lowest
    OIP      "parameters": {"timeout": 250000, "priority": 1}     microseconds; named as Triton names them

Where both are given the shorter time and the higher priority count. 0 means the default, as in Triton. A
client may ask for less time than the service's `slo_ms`, not for more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.errors import BadRequest
from serving.protocol.reading import brief
from serving.protocol.requests import Parameters

TIMEOUT_HEADER = b"x-request-timeout-seconds"
PRIORITY_HEADER = b"x-request-priority"
HIGHEST, DEFAULT, LOWEST = 1, 2, 3
_MAX_CHARS = 32
_MAX_TIMEOUT_US = 2**64


@dataclass(frozen=True, slots=True)
class Terms:
    """What a client asks for. `timeout_s` None: as long as the service gives."""

    timeout_s: float | None = None
    priority: int = DEFAULT

    def deadline_s(self, now_s: float, slo_s: float) -> float:
        """When a request that came at `now_s` is no longer worth answering."""
        return now_s + (slo_s if self.timeout_s is None else min(slo_s, self.timeout_s))


_DEFAULT = Terms()


def read_terms(headers: Mapping[bytes, bytes], parameters: Parameters) -> Terms:
    """The terms of a request.

    Raises:
        BadRequest: a priority or a parameter that can't be read. A header with a timeout that isn't a
            positive number is passed over: proxies and clients put all kinds of things there.
    """
    asked, urged = headers.get(TIMEOUT_HEADER), headers.get(PRIORITY_HEADER)
    if asked is None and urged is None and not parameters:
        return _DEFAULT
    timeouts = (_header_timeout_s(asked), _parameter_timeout_s(parameters.get("timeout")))
    priorities = (_header_priority(urged), _parameter_priority(parameters.get("priority")))
    return Terms(
        min((timeout_s for timeout_s in timeouts if timeout_s is not None), default=None),
        min((priority for priority in priorities if priority is not None), default=DEFAULT),
    )


def _header_timeout_s(text: bytes | None) -> float | None:
    if text is None or len(text) > _MAX_CHARS:
        return None
    try:
        timeout_s = float(text)
    except ValueError:
        return None
    return timeout_s if timeout_s > 0 and math.isfinite(timeout_s) else None


def _parameter_timeout_s(value: Any) -> float | None:
    if value is None or (type(value) is int and value == 0):
        return None
    if type(value) is not int or not 0 < value < _MAX_TIMEOUT_US:
        raise BadRequest(
            "the parameter 'timeout' can't be read",
            got=brief(value),
            allowed="a whole number of microseconds",
            fix="send microseconds, or leave it out for the service's own limit",
        )
    return value / 1e6


def _header_priority(text: bytes | None) -> int | None:
    if text is None:
        return None
    if not (text.isdigit() and len(text) == 1):
        raise _no_priority(f"x-request-priority: {brief(text.decode('latin-1'))}")
    return _parameter_priority(int(text))


def _parameter_priority(value: Any) -> int | None:
    if value is None or (type(value) is int and value == 0):
        return None
    if type(value) is not int or not HIGHEST <= value <= LOWEST:
        raise _no_priority(brief(value))
    return value


def _no_priority(got: str) -> BadRequest:
    return BadRequest(
        "the priority is none",
        got=got,
        allowed=f"{HIGHEST} (the highest) to {LOWEST}; 0 or nothing for {DEFAULT}",
        fix="send one of these",
    )
