"""One rank that shards a model, saves it or loads it: `python tests/fsdp_saver.py save|load STORE OUT`.

Started as torchrun would, for tests of checkpoints at several world sizes. What it then holds is written,
whole, to OUT by rank 0, so that a test can compare.
"""

import os
import sys
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from cluster.manifest import Writer
from cluster.runs import Run
from cluster.storage import open_store
from training.checkpoints.checkpoint import CheckpointMeta, load_checkpoint
from training.checkpoints.saver import Saver
from training.loop import TrainState
from training.recipe import Checkpointing

WITHIN_S = 60.0


class Model(torch.nn.Module):
    """Rows that no world size divides, a tied weight, a bfloat16 matrix, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(6, 11)
        self.second = torch.nn.Linear(11, 11, bias=False)
        self.tied = torch.nn.Linear(11, 11, bias=False)
        self.tied.weight = self.second.weight
        self.scale = torch.nn.Parameter(torch.randn(1))
        self.register_buffer("table", torch.arange(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.tied(self.second(self.first(x).relu()))


def sharded_state(seed: int, *, trained: bool) -> TrainState:
    torch.manual_seed(seed)
    model = Model()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    if trained:
        model(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return TrainState(model, optimizer, step=int(trained), cursor=int(trained))


def whole(state: TrainState) -> dict[str, torch.Tensor]:
    """Every tensor of a state, gathered. A collective."""

    def full(value: Any) -> torch.Tensor:
        return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()

    found = {f"model/{name}": full(value) for name, value in state.model.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state[parameter].items():
            found[f"optimizer/{name}/{key}"] = full(value)
    return found


def main(what: str, store: str, out: str) -> None:
    exchange, rank, world = next(rendezvous("env://"))
    dist.init_process_group("gloo", store=exchange, rank=rank, world_size=world)
    run = Run(open_store(store), "r")
    state = sharded_state(seed=0 if what == "save" else 1, trained=what == "save")
    if what == "save":
        saver = Saver(
            run,
            state,
            Checkpointing(),
            rank=rank,
            world=world,
            exchange=exchange.clone() if world > 1 else None,
            newest=0,
            writer=Writer(epoch=1, generation=0),
            on_commit=lambda manifest: None,
            on_failure=lambda error: None,
        )
        saver.save(CheckpointMeta(step=1, cursor=1, fingerprint="f", ledger=()))
        saver.wait(WITHIN_S)
        saver.close()
    else:
        artifacts = run.checkpoints()
        load_checkpoint(state, artifacts, artifacts.read(1))
        assert (state.step, state.cursor) == (1, 1)
    found = whole(state)
    if rank == 0:
        save_file(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:])
    os._exit(0)  # torch's own threads may still be running, and abort an interpreter that ends
