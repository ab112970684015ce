"""The device of the batching benchmark: a model that sleeps, so that only the batching is compared.

A batch takes `BATCH_S`, `ROW_S` for each row and, where rows have lengths, `ELEMENT_S` for each padded
element. One batch runs at a time. Each row carries the time by which its client needs the answer, on the
machine's monotonic clock, so the device knows what it runs in vain. Every batch is a line in
`$BENCH_DEVICE_LOG`.

Stands beside the servers because it is imported in their environments, where Tandem isn't installed.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence

BATCH_S = 0.050
ROW_S = 0.001
ELEMENT_S = 5e-6
MAX_ROWS = 32

_one_at_a_time = threading.Lock()


def duration_s(rows: int, longest: int) -> float:
    """How long a batch takes."""
    return BATCH_S + rows * (ROW_S + longest * ELEMENT_S)


def note(dues_s: Sequence[float], lengths: Sequence[int], longest: int) -> None:
    """Write a line about the batch that begins now; blank batches (nobody waits for them) are left out."""
    if not any(dues_s):
        return
    now_s = time.monotonic()
    line = {
        "rows": len(dues_s),
        "expired": sum(due_s < now_s for due_s in dues_s),
        "own": sum(lengths),
        "padded": len(dues_s) * longest,
    }
    with open(os.environ["BENCH_DEVICE_LOG"], "a") as log:
        log.write(json.dumps(line) + "\n")


def run(dues_s: Sequence[float], lengths: Sequence[int] = (), longest: int = 0) -> None:
    """Run a batch: one number, and where they vary one length, for each row, padded to `longest`."""
    with _one_at_a_time:
        note(dues_s, lengths, longest)
        time.sleep(duration_s(len(dues_s), longest))
