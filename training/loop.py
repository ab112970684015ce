"""One worker's steps: batches in, a moved model out. Knows torch, not Ray, storage or YAML files.

Works alone or inside any `torch.distributed` process group. What makes a resumed run the same run:
- the learning rate and every random number are pure functions of (seed, step, rank);
- the loss is a sum over the global batch divided by its rows, so it means the same for any number
  of workers and for the smaller batch at an epoch's end;
- padding rows have weight 0, so a rank with nothing to do still takes part in every collective.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.nn.parallel import DistributedDataParallel

from cluster.errors import BadInput, RunFailed, shown
from training.recipe import Optimization
from training.schedule import learning_rate
from training.task import Arrays, Task, Tensors

REPORT_EVERY_STEPS = 10


class Batch(Protocol):
    """What the loader yields (`training.loader.HostBatch`): this rank's rows of one global batch."""

    @property
    def next_cursor(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def global_rows(self) -> int: ...
    @property
    def arrays(self) -> Arrays: ...
    @property
    def weight(self) -> NDArray[np.float32]: ...


@dataclass(slots=True)
class TrainState:
    """All that changes while training. `cursor` counts rows consumed by all workers together."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    step: int = 0
    cursor: int = 0
    finite: torch.Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.bool))
    """Whether this rank's loss has been finite at every step; read it only where waiting is worth it."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """One finished step, as seen by one rank."""

    step: int
    """Steps done, this one included."""
    cursor: int
    epoch: int
    global_rows: int
    loss: float | None
    """Mean over the global batches since the last report; None between reports."""
    data_wait_s: float
    step_s: float


def new_state(task: Task, optimization: Optimization, device: torch.device) -> TrainState:
    """A fresh model and optimizer, the same on every rank."""
    torch.manual_seed(_seed(optimization.seed, "model"))
    model = task.build_model().to(device)
    # Weight decay is for matrices; biases, norms and scales are left alone, as is usual since GPT-2.
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": optimization.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=optimization.learning_rate)
    return TrainState(model, optimizer, finite=torch.ones((), dtype=torch.bool, device=device))


def train_steps(
    task: Task,
    state: TrainState,
    batches: Iterable[Batch],
    optimization: Optimization,
    *,
    total_steps: int,
    device: torch.device,
    on_step: Callable[[StepReport], None],
) -> None:
    """Run every batch; `state` is current at each call of `on_step`.

    Raises:
        RunFailed: the loss is not finite.
        BadInput: the task's loss isn't one number a row.
        Whatever `on_step` raises, to stop.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    state.model.train()
    wrapped: torch.nn.Module = DistributedDataParallel(state.model) if world > 1 else state.model
    if optimization.compile:
        wrapped = torch.compile(wrapped)  # type: ignore[assignment]
    losses = _LossWindow(device)
    waited_from_s = time.monotonic()
    for batch in batches:
        started_s = time.monotonic()
        torch.manual_seed(_seed(optimization.seed, f"step {state.step} rank {rank}"))
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(state.step, total_steps, optimization)
        loss = _backward(task, wrapped, batch, optimization, world, device)
        state.finite &= torch.isfinite(loss)
        if optimization.gradient_clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(state.model.parameters(), optimization.gradient_clip_norm)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.cursor = batch.next_cursor
        losses.add(loss)
        due = state.step % REPORT_EVERY_STEPS == 0 or state.step == total_steps
        mean_loss = losses.reduce(world) if due else None
        if mean_loss is not None and not math.isfinite(mean_loss):
            raise RunFailed(
                f"the loss is not a finite number by step {state.step}",
                got=str(mean_loss),
                fix="look for extreme values in the data, or start a new run with a lower learning_rate",
            )
        now_s = time.monotonic()
        on_step(
            StepReport(
                step=state.step,
                cursor=state.cursor,
                epoch=batch.epoch,
                global_rows=batch.global_rows,
                loss=mean_loss,
                data_wait_s=started_s - waited_from_s,
                step_s=now_s - waited_from_s,
            )
        )
        waited_from_s = time.monotonic()


def _backward(
    task: Task,
    wrapped: torch.nn.Module,
    batch: Batch,
    optimization: Optimization,
    world: int,
    device: torch.device,
) -> torch.Tensor:
    """Accumulate the gradients of one global batch; give this rank's part of its mean loss."""
    tensors = {name: _to_device(array, device) for name, array in batch.arrays.items()}
    weight_B = _to_device(batch.weight, device)
    local_rows = len(weight_B)
    micro = min(optimization.micro_batch_size or local_rows, local_rows)
    starts = range(0, local_rows, micro)
    total = torch.zeros((), device=device)
    for start in starts:
        part: Tensors = {name: tensor[start : start + micro] for name, tensor in tensors.items()}
        last = start == starts[-1]
        # Only the last part's backward pass exchanges gradients.
        held = isinstance(wrapped, DistributedDataParallel) and not last
        with (
            wrapped.no_sync() if held else contextlib.nullcontext(),  # type: ignore[operator]
            torch.autocast(device.type, torch.bfloat16, enabled=optimization.precision == "bf16"),
        ):
            loss_B = task.loss(wrapped, part)
            rows = min(micro, local_rows - start)
            if loss_B.shape != (rows,):
                raise BadInput(
                    f"{type(task).__name__}.loss must give one loss a row",
                    got=f"shape {shown(tuple(loss_B.shape))}",
                    allowed=f"shape ({rows},)",
                    fix="use reduction='none', and take the mean over other axes only",
                )
            loss = (loss_B.float() * weight_B[start : start + micro]).sum() / batch.global_rows
            # DDP averages over ranks; what is wanted is the sum.
            (loss * world).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    return total


class _LossWindow:
    """The mean loss since the last report, exchanged between ranks only when it is asked for."""

    def __init__(self, device: torch.device) -> None:
        self._sum = torch.zeros((), device=device)
        self._steps = 0

    def add(self, loss: torch.Tensor) -> None:
        self._sum += loss
        self._steps += 1

    def reduce(self, world: int) -> float:
        total = self._sum.clone()
        if world > 1:
            dist.all_reduce(total)
        mean = float(total) / self._steps
        self._sum.zero_()
        self._steps = 0
        return mean


def _to_device(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def _seed(seed: int, purpose: str) -> int:
    """A seed for one purpose; unlike `seed + n`, no two purposes can meet."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:8], "big") >> 1
