"""What two sharded ranks (FSDP2) save, one, two or three ranks load, and so does an export without any."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fsdp_saver import Model
from safetensors.torch import load_file

from cluster.runs import Run
from cluster.storage import open_store
from training.checkpoints.checkpoint import LAYOUT, Restored, load_checkpoint, restore_model
from training.loop import TrainState

TESTS = Path(__file__).parents[1]
WITHIN_S = 100


def run_ranks(what: str, world: int, store: Path, out: Path) -> dict[str, torch.Tensor]:
    """What the ranks hold afterwards, gathered."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "fsdp_saver.py"), what, str(store), str(out)],
            env={**os.environ, "RANK": str(rank), **place},
        )
        for rank in range(world)
    ]
    try:
        assert [rank.wait(WITHIN_S) for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return load_file(out)


def refused(number: int, error: Exception) -> None:
    pytest.fail(f"checkpoint {number} was passed over: {error}")


@pytest.mark.timeout(240)
def test_what_two_ranks_save_any_number_loads(tmp_path: Path) -> None:
    store = tmp_path / "store"
    saved = run_ranks("save", 2, store, tmp_path / "saved")

    artifacts = Run(open_store(str(store)), "r").checkpoints()
    manifest = artifacts.read(1)
    layout = json.loads(artifacts.read_file(manifest, LAYOUT))
    pieces = [piece for of_file in layout["files"].values() for piece in of_file]
    assert ["model/first.weight", 0, 6] in pieces  # a shard as it is
    assert ["model/first.weight", 6, 11] in pieces

    loaded = run_ranks("load", 3, store, tmp_path / "loaded")
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)

    # Here, without a process group: into a plain model, as one rank or an export has it.
    plain = Model()
    state = TrainState(plain, torch.optim.AdamW(plain.parameters()))
    load_checkpoint(state, artifacts, manifest)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, saved[f"model/{name}"])
    for name, parameter in plain.named_parameters():
        for key, value in state.optimizer.state[parameter].items():
            assert torch.equal(value, saved[f"optimizer/{name}/{key}"])
    exported = Model()
    assert isinstance(restore_model(exported, artifacts, refused), Restored)
    assert torch.equal(exported.tied.weight, saved["model/second.weight"])
