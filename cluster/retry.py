"""Trying again, with pauses that grow and are never the same for two callers.

The pause doubles from 0.1 s up to 5 s, and a random half of it is left out: after an outage a group
of workers must not come back all at once, nor a minute late ("equal jitter", Brooker, "Exponential
Backoff And Jitter", AWS Architecture Blog, 2015).

Knows nothing of what is tried.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeVar

from cluster.clock import SYSTEM_CLOCK, Clock

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0

T = TypeVar("T")


def retried(
    call: Callable[[], T],
    *,
    transient: Callable[[Exception], bool],
    retry_s: float,
    clock: Clock = SYSTEM_CLOCK,
    uniform: Callable[[float, float], float] = random.uniform,
) -> T:
    """What `call` returns, once it does.

    Args:
        transient: whether an error may be gone the next time.
        retry_s: no attempt begins later than so many seconds after the first.
        uniform: gives a random number between two.

    Raises:
        Exception: what the last attempt raised.
    """
    began_s = clock.monotonic_s()
    ceiling_s = FIRST_PAUSE_S
    last = False
    while True:
        try:
            return call()
        except Exception as error:
            left_s = retry_s - (clock.monotonic_s() - began_s)
            if last or left_s <= 0 or not transient(error):
                raise
        pause_s = uniform(ceiling_s / 2, ceiling_s)
        last = pause_s >= left_s
        clock.sleep(min(left_s, pause_s))
        ceiling_s = min(2 * ceiling_s, LONGEST_PAUSE_S)
