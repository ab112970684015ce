"""How much of a backward pass is waiting for other workers: DDP's exchange, as far as it isn't hidden.

DDP sends gradients in buckets while the backward pass goes on. When the last gradient is there, nothing
is left to compute, and the rest of the pass is waiting: for the network, and for slower workers. So
one hook, on the parameter whose gradient comes last, stamps that moment, and `finished` books what
followed as communication. DDP's own hooks would do it too, but they replace its exchange with one
that goes through Python for each bucket: 5% of a small model's step, where this costs nothing that
could be measured.

On the CPU only: on CUDA the host doesn't wait, and the exchange stays in the stream, so it counts as
compute there. FSDP's exchanges, which lie inside both passes, count as compute everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.hooks import RemovableHandle

from cluster.clock import SYSTEM_CLOCK, Clock
from training.goodput import Account


class ExposedExchange:
    """Books the exposed part of one DDP model's exchanges in an account."""

    def __init__(self, account: Account, clock: Clock = SYSTEM_CLOCK) -> None:
        self._account = account
        self._clock = clock
        self._ready_s: float | None = None
        self._handles: list[RemovableHandle] = []
        self._last: torch.nn.Parameter | None = None
        """Whose gradient came last in the first pass, while that is being found out."""

    def watch(self, model: torch.nn.Module) -> None:
        """From the second backward pass on: the first one shows which gradient comes last.

        Args:
            model: the bare model, or its DDP; on CUDA nothing happens.
        """
        self.unwatch()
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.device.type == "cpu":
                self._hook(parameter, self._seen)

    def finished(self) -> None:
        """The backward pass that exchanged gradients is over."""
        now_s = self._clock.monotonic_s()
        if self._ready_s is not None:
            self._account.move(now_s - self._ready_s, "compute", "communication")
            self._ready_s = None
        elif self._last is not None:
            last = self._last
            self.unwatch()
            self._hook(last, self._ready)

    def unwatch(self) -> None:
        """Take the hooks off: before the model gets another DDP."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._last, self._ready_s = [], None, None

    def _hook(self, parameter: torch.nn.Parameter, call: Callable[[torch.nn.Parameter], None]) -> None:
        handle = parameter.register_post_accumulate_grad_hook(call)  # type: ignore[no-untyped-call]
        self._handles.append(handle)

    def _seen(self, parameter: torch.nn.Parameter) -> None:
        self._last = parameter

    def _ready(self, _: torch.nn.Parameter) -> None:
        self._ready_s = self._clock.monotonic_s()
