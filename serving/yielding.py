"""Work that yields to requests: run in a thread to which the system gives only what others leave.

Loading a version takes all of a core for a while, on the cores that answer requests meanwhile. Linux gives
each thread a priority of its own, which it can lower and never raise again: hence a thread for each piece of
work, and none that starts threads which are to run at full priority later.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

_NICE = 10


def yielding(call: Callable[[], T]) -> T:
    """What `call` gives, or raises."""
    done: Future[T] = Future()

    def run() -> None:
        with contextlib.suppress(OSError, AttributeError):  # elsewhere a thread has no priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001 - it is the caller's
            done.set_exception(error)

    threading.Thread(target=run, name="tandem-load", daemon=True).start()
    return done.result()
