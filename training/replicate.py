"""One worker's state to all workers of a group, from memory to memory.

After a failure each survivor holds the whole state of a data-parallel run, as of its last finished
step. The one that is furthest ahead gives it to the others, so nothing is read back from a store.

Knows nothing of files; a sharded (FSDP) state isn't whole on any worker, and isn't for this.
"""

from __future__ import annotations

import orjson
import torch
import torch.distributed as dist

from training.group import Group
from training.loop import TrainState

_KEY = "replicate"


def furthest(group: Group, step: int | None, device: torch.device) -> tuple[int, list[int]] | None:
    """Who is furthest ahead. Every rank calls it with the step of the state it holds, None without one.

    Returns:
        The rank to take the state from, and every rank's step, -1 for none; None where no one has a state.
    """
    mine = torch.tensor([-1 if step is None else step], device=device)
    if group.world == 1:
        steps = [int(mine)]
    else:
        all_steps = [torch.zeros_like(mine) for _ in range(group.world)]
        dist.all_gather(all_steps, mine)
        steps = [int(s) for s in all_steps]
    best = max(steps)
    return None if best < 0 else (steps.index(best), steps)


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
