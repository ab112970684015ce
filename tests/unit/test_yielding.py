"""Work that yields runs elsewhere, at a lower priority, and gives back what it gives or raises."""

from __future__ import annotations

import os
import sys
import threading

import pytest

from serving.yielding import yielding


def test_it_gives_what_the_call_gives() -> None:
    here = threading.get_native_id()
    assert yielding(threading.get_native_id) != here


def test_it_raises_what_the_call_raises() -> None:
    def fail() -> None:
        raise ValueError("no such version")

    with pytest.raises(ValueError, match="no such version"):
        yielding(fail)


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of single threads are Linux's")
def test_only_its_own_thread_is_slowed() -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    there = yielding(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
    assert there > before or before >= 10
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
