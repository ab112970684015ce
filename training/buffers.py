"""What a forward pass moves besides the weights, kept so that a broken step can be undone."""

from __future__ import annotations

import torch

_SMALL_BUFFER_VALUES = 65_536


class Buffers:
    """Copies of the buffers that forward passes move, such as running means, as of the last finished step.

    Large ones, mostly tables that never move, are copied only if the first step has moved them. (Version
    counters would tell more cheaply, but batch norm's kernels move buffers without counting.)
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._kept = [(b, b.detach().clone()) for b in model.buffers() if b.numel()]
        self._first = True

    def keep(self) -> None:
        """The step is finished: what it moved is the new state."""
        if self._first:
            self._first = False
            self._kept = [
                (b, copy)
                for b, copy in self._kept
                if b.numel() <= _SMALL_BUFFER_VALUES or not torch.equal(b, copy)
            ]
        for buffer, copy in self._kept:
            copy.copy_(buffer)

    def put_back(self) -> None:
        """The step is broken off: what it moved counts for nothing."""
        with torch.no_grad():
            for buffer, copy in self._kept:
                buffer.copy_(copy)
