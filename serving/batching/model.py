"""A runtime with what batching must know of it: which requests may share a batch, and how long one takes.

The latency is measured once when the model is loaded, so that the first requests are judged by something;
from then on it is learned from the batches that run.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator

import numpy as np

from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.signature import NUMPY_DTYPES, Signature, Tensor
from serving.batching.form import Arrays, Form
from serving.batching.latency import LatencyModel
from serving.runtimes.base import Runtime

logger = logging.getLogger("tandem.serving")

MEASURED_LENGTHS = (16, 128)
MEASURE_FOR_S = 2.0
TINY_S = 0.0002
"""A model whose full batch takes no longer than this is tiny: to hand it to a thread costs as much again."""


class BatchModel:
    """One version of a model, as the executor runs it. Requests share a batch only within one of these."""

    def __init__(self, runtime: Runtime, signature: Signature | None = None) -> None:
        self.runtime = runtime
        self.form = Form(signature)
        self.latency = LatencyModel()
        self.seen: Callable[[int, int, float], None] | None = None
        """Told of each batch that ran: rows, length, seconds. For whoever compares versions."""
        self.is_tiny = False
        """Whether batches may run on the event loop itself, as they take no longer than reading a request."""
        self._signature = signature

    def take_after(self, other: BatchModel) -> None:
        """Begin with what another version has learned, until batches of this one say otherwise.

        What `measure` finds while the machine serves is too much: blank batches yield to real ones. Whoever
        believed it would refuse at once what the version could well answer.
        """
        if self._signature == other._signature and other.latency.known:
            self.latency = copy.deepcopy(other.latency)
            self.is_tiny = self.is_tiny or other.is_tiny

    def measure(self, max_batch_rows: int, clock: Clock = SYSTEM_CLOCK) -> None:
        """Run blank batches, small ones first, and learn from them; blocks, for some seconds at most.

        A size is run twice, as what is set up lazily belongs to no batch.

        Raises:
            Exception: the model raises on blanks although its signature leaves nothing open. (Sizes of free
                axes are a guess; a model that refuses those is learned from real batches.)
        """
        assert self._signature is not None, "a model without a signature can't be given blanks"
        end_s = clock.monotonic_s() + MEASURE_FOR_S
        longest_s = 0.0
        for rows, axis in self._sizes(max_batch_rows):
            inputs = {tensor.name: _blank(tensor, rows, axis) for tensor in self._signature.inputs}
            try:
                for _ in range(2):
                    started_s = clock.monotonic_s()
                    self.runtime.run(inputs)
                    stopped_s = clock.monotonic_s()
            except Exception as error:  # the edge of the model's code
                if not self.form.varies:
                    raise
                logger.info("a blank batch of %d rows, free axes of %d, is refused: %s", rows, axis, error)
                longest_s = math.inf  # nobody knows
                continue
            self.latency.observe(rows, self.form.size(inputs).length, stopped_s - started_s)
            longest_s = max(longest_s, stopped_s - started_s)
            if stopped_s > end_s:
                return
        self.is_tiny = longest_s <= TINY_S

    def _sizes(self, max_batch_rows: int) -> Iterator[tuple[int, int]]:
        """Rows and the size of free axes, of each batch to measure."""
        for axis in MEASURED_LENGTHS if self.form.pads else (1,):
            for rows in sorted({1, max_batch_rows}):
                yield rows, axis


def _blank(tensor: Tensor, rows: int, axis_size: int) -> np.ndarray:
    """Zeros, empty strings or what the signature pads with."""
    shape = (rows, *(axis_size if n == -1 else n for n in tensor.shape[1:]))
    value = tensor.padding if tensor.padding is not None else "" if tensor.dtype == "BYTES" else 0
    return np.full(shape, value, NUMPY_DTYPES[tensor.dtype])


__all__ = ["Arrays", "BatchModel"]
