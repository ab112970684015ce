"""One worker's state to all workers of a group, from memory to memory.

After a failure each survivor holds the whole state of a data-parallel run, as of its last finished
step. The one that is furthest ahead gives it to the others, so nothing is read back from a store.

Knows nothing of files; a sharded (FSDP) state isn't whole on any worker, and isn't for this.
"""

from __future__ import annotations

from typing import NamedTuple

import orjson
import torch
import torch.distributed as dist

from training.group import Group
from training.loop import TrainState

_KEY = "replicate"


class Mark(NamedTuple):
    """Where a state stands. Two that stand alike are the same; later steps are greater."""

    step: int
    generation: int
    """The last one that trained it."""


class Leader(NamedTuple):
    """Whose state a group takes."""

    rank: int
    mark: Mark
    is_shared: bool
    """Whether every rank holds that very state already."""


def furthest(group: Group, mark: Mark | None, device: torch.device) -> Leader | None:
    """Who is furthest ahead. Every rank calls it with the mark of the state it holds, None without one.

    Returns:
        None where no one has a state.
    """
    mine = torch.tensor(mark or Mark(-1, -1), device=device)
    if group.world == 1:
        gathered = [mine]
    else:
        gathered = [torch.zeros_like(mine) for _ in range(group.world)]
        dist.all_gather(gathered, mine)
    marks = [Mark(*each.tolist()) for each in gathered]
    best = max(marks)
    if best.step < 0:
        return None
    return Leader(marks.index(best), best, is_shared=all(mark == best for mark in marks))


def replicate(state: TrainState, source: int, group: Group) -> None:
    """Overwrite every rank's model and optimizer with those of rank `source`. Step and cursor stay."""
    assert group.store is not None
    weights = state.model.state_dict()
    for name in weights:
        dist.broadcast(weights[name].detach(), source)
    parameters = dict(state.model.named_parameters())
    if group.rank == source:
        listed = [
            [name, key, str(value.dtype).removeprefix("torch."), list(value.shape), value.device.type]
            for name, parameter in parameters.items()
            for key, value in state.optimizer.state.get(parameter, {}).items()
        ]
        group.store.set(_KEY, orjson.dumps(listed).decode())
    else:
        state.optimizer.state.clear()
    for name, key, dtype, shape, kind in orjson.loads(group.store.get(_KEY)):
        parameter = parameters[name]
        device = parameter.device if kind != "cpu" else torch.device("cpu")
        if group.rank == source:
            value = state.optimizer.state[parameter][key]
        else:
            value = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            state.optimizer.state[parameter][key] = value
        _broadcast(value, source, parameter.device)


def _broadcast(value: torch.Tensor, source: int, device: torch.device) -> None:
    """AdamW keeps its step count on the CPU, where NCCL can't reach it."""
    if value.device == device:
        dist.broadcast(value, source)
        return
    moved = value.to(device)
    dist.broadcast(moved, source)
    value.copy_(moved)
