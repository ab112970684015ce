"""One worker's steps: batches in, a moved model out. Knows torch, not Ray, storage or YAML files.

Works alone or inside any `torch.distributed` process group. What makes a resumed run the same run:
- the learning rate and every random number are pure functions of (seed, step, rank);
- the loss is a sum over the global batch divided by its rows, so it means the same for any number
  of workers and for the smaller batch at an epoch's end;
- padding rows have weight 0, so a rank with nothing to do still takes part in every collective;
- whatever is raised, `state` is that of the last finished step: gradients are dropped, and buffers that a
  forward pass has moved are put back. So a worker whose peer died in mid-step goes on from memory,
  unless a step that nobody had judged yet has ruined it (`TrainState.sound`).
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cluster.errors import BadInput, shown
from cluster.goodput import Kind
from training.buffers import Buffers
from training.losses import Losses, Poisoned
from training.recipe import Optimization
from training.schedule import learning_rate
from training.task import Arrays, Task, Tensors

REPORT_EVERY_STEPS = 10


class Batch(Protocol):
    """What the loader yields (`training.data.loader.HostBatch`): this rank's rows of one global batch."""

    @property
    def cursor(self) -> int: ...
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
    sound: bool = True
    """False once a step is known to have ruined it, or may have, unseen: not to be handed on to others."""


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
    skipped: bool = False
    """Whether the batch was left out on purpose: the step moved nothing."""


class Hooks(Protocol):
    """What the loop asks and tells while it steps. Every rank must answer alike."""

    def is_skipped(self, cursor: int) -> bool:
        """Whether the batch that starts at `cursor` is to be left out."""
        ...

    def is_due(self, step: int) -> bool:
        """Whether the losses must be known after `step`, because something is to be done then."""
        ...

    def begin_step(self, step: int) -> None:
        """The step after `step` finished ones begins."""
        ...

    def on_wrapped(self, model: DistributedDataParallel) -> None:
        """The model as it is called for this group, before its first pass."""
        ...

    def on_forward(self) -> None:
        """The loss is known; what follows waits for the other ranks."""
        ...

    def on_backward(self) -> None:
        """A backward pass is over, its exchange included."""
        ...

    def on_step(self, step: StepReport) -> None:
        """A step is done; `state` is current. Whatever this raises stops the loop."""
        ...

    def switch(self, kind: Kind) -> None:
        """Time from now on is of this kind."""
        ...


def new_state(
    task: Task,
    optimization: Optimization,
    device: torch.device,
    prepare: Callable[[torch.nn.Module], None] | None = None,
) -> TrainState:
    """A fresh model and optimizer, the same on every rank.

    Args:
        prepare: done to the model before the optimizer is made, such as sharding it.
    """
    torch.manual_seed(_seed(optimization.seed, "model"))
    model = task.build_model().to(device)
    if prepare is not None:
        prepare(model)
    return TrainState(model, new_optimizer(model, optimization))


def new_optimizer(model: torch.nn.Module, optimization: Optimization) -> torch.optim.Optimizer:
    """AdamW over a model's parameters; make it after sharding the model, never before."""
    # Weight decay is for matrices; biases, norms and scales are left alone, as is usual since GPT-2.
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": optimization.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=optimization.learning_rate)


def train_steps(
    task: Task,
    state: TrainState,
    batches: Iterable[Batch],
    optimization: Optimization,
    *,
    total_steps: int,
    device: torch.device,
    hooks: Hooks,
    spike_factor: float | None = None,
) -> None:
    """Run every batch; `state` is current at each call of `hooks.on_step`, and after whatever is raised.

    Raises:
        Poisoned: a step ruined the weights, or would have; on every rank after the same step.
        BadInput: the task's loss isn't one number a row.
        Whatever `hooks.on_step` raises, to stop.
        RuntimeError: from torch, where a peer is gone.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    state.model.train()
    wrapped = _wrapped(state.model, world)
    if isinstance(wrapped, DistributedDataParallel):
        hooks.on_wrapped(wrapped)
    if optimization.compile:
        wrapped = torch.compile(wrapped)  # type: ignore[assignment]
    losses = Losses(device, world, spike_factor)
    buffers = Buffers(state.model)
    waited_from_s = time.monotonic()
    hooks.switch("data")
    with _marking_ruin(state, losses):
        for batch in batches:
            started_s = time.monotonic()
            hooks.begin_step(state.step)
            skipped = hooks.is_skipped(batch.cursor)
            if not skipped:
                hooks.switch("compute")
                torch.manual_seed(_seed(optimization.seed, f"step {state.step} rank {rank}"))
                for group in state.optimizer.param_groups:
                    group["lr"] = learning_rate(state.step, total_steps, optimization)
                try:
                    part = _step(task, state, wrapped, batch, optimization, world, device, hooks)
                    losses.add(state.step + 1, batch.cursor, batch.next_cursor, part)
                except BaseException:
                    buffers.put_back()
                    state.optimizer.zero_grad(set_to_none=True)
                    raise
                buffers.keep()
            state.step += 1
            state.cursor = batch.next_cursor
            due = (
                state.step % REPORT_EVERY_STEPS == 0 or state.step == total_steps or hooks.is_due(state.step)
            )
            if due and world > 1 and device.type == "cpu":  # on CUDA the host waits for computation there
                hooks.switch("communication")
            mean_loss = losses.reduce() if due else None
            hooks.switch("compute")
            now_s = time.monotonic()
            hooks.on_step(
                StepReport(
                    step=state.step,
                    cursor=state.cursor,
                    epoch=batch.epoch,
                    global_rows=batch.global_rows,
                    loss=mean_loss,
                    data_wait_s=started_s - waited_from_s,
                    step_s=now_s - waited_from_s,
                    skipped=skipped,
                )
            )
            waited_from_s = time.monotonic()
            hooks.switch("data")


@contextlib.contextmanager
def _marking_ruin(state: TrainState, losses: Losses) -> Iterator[None]:
    """Where the loop is broken off, say of the state whether a step may have ruined it that nobody judged."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Poisoned) or losses.are_in_doubt():
            state.sound = False
        raise


def _wrapped(model: torch.nn.Module, world: int) -> torch.nn.Module:
    """The model as it is called: a sharded one exchanges gradients itself. Ranks start from one state."""
    if world == 1 or isinstance(model, FSDPModule):
        return model
    return DistributedDataParallel(model, init_sync=False)


def _step(
    task: Task,
    state: TrainState,
    wrapped: torch.nn.Module,
    batch: Batch,
    optimization: Optimization,
    world: int,
    device: torch.device,
    hooks: Hooks,
) -> torch.Tensor:
    """Move the weights by one global batch.

    Returns:
        This rank's part of the batch's mean loss; not a number where the gradient is not finite.
    """
    loss = _backward(task, wrapped, batch, optimization, world, device, hooks)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if optimization.gradient_clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, optimization.gradient_clip_norm, norm)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return torch.where(torch.isfinite(norm), loss, torch.nan)


def _backward(
    task: Task,
    wrapped: torch.nn.Module,
    batch: Batch,
    optimization: Optimization,
    world: int,
    device: torch.device,
    hooks: Hooks,
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
        with (
            _exchanging(wrapped, start == starts[-1]),
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
            hooks.on_forward()
            # Gradients are averaged over ranks; what is wanted is the sum.
            (loss * world).backward()  # type: ignore[no-untyped-call]
            hooks.on_backward()
        total += loss.detach()
    return total


def _exchanging(wrapped: torch.nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Only the backward pass of a batch's last part exchanges gradients."""
    if isinstance(wrapped, DistributedDataParallel) and not last:
        return wrapped.no_sync()
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def _to_device(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def _seed(seed: int, purpose: str) -> int:
    """A seed for one purpose; unlike `seed + n`, no two purposes can meet."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:8], "big") >> 1
