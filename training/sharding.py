"""A model's state sharded over the workers (FSDP2), for models too large to be whole on each.

Blocks (the members of module lists, as transformers have them) are gathered one at a time; what is left of
the model is the last unit. Source of the method: `torch.distributed.fsdp.fully_shard`, along axis 0.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def shard(model: torch.nn.Module) -> None:
    """Shard `model` in place over the current process group; do it before making an optimizer.

    The shards belong to that group: a worker that leaves it can't take them along.
    """
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
