"""The ways to save that are compared: Ray Train's, torch's distributed checkpoint, and Tandem's.

Each is written as its own guides say, with what they advise for speed: buffers that are used again,
state shared out over the ranks. A way is asked to save, and then whether all of it is stored.
"""

from __future__ import annotations

import tempfile
from abc import ABC, abstractmethod
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.train import Checkpoint
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from cluster.errors import TandemError
from cluster.manifest import Writer
from cluster.runs import Run
from cluster.storage import open_store
from training.checkpoints.checkpoint import CheckpointMeta
from training.checkpoints.saver import Saver
from training.loop import TrainState
from training.recipe import Checkpointing

STATE = "state.pt"
TURN = "step-{:08d}"


@dataclass
class Training:
    """The state that is saved."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    rank: int
    world: int
    step: int = 0


class Way(ABC):
    """One way to save. `folder` is its own."""

    name = ""

    def __init__(self, training: Training, folder: Path, store: str = "") -> None:
        self.training = training
        self.folder = folder
        self.store = store or str(folder)
        """Where those that know object storage save to."""
        folder.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def save(self) -> None:
        """Save; training may go on when it returns."""

    @abstractmethod
    def stored(self) -> bool:
        """Whether this rank's part of the last save is on the disk."""

    def stepped(self, step_s: float) -> None:  # noqa: B027 - only Tandem's listens
        """A step of training took `step_s`, be it quiet or during an upload."""

    def close(self) -> None:  # noqa: B027 - most ways have nothing to do
        """No save comes after."""


class RayRankZero(Way):
    """Ray Train's guide for data-parallel training: rank 0 saves all, `report` copies it to storage."""

    name = "ray-rank-0"

    def save(self) -> None:
        if self.training.rank != 0:
            ray.train.report({"step": self.training.step})
            return
        state = {
            "model": self.training.model.state_dict(),
            "optimizer": self.training.optimizer.state_dict(),
        }
        self._report(state, STATE)

    def stored(self) -> bool:
        return True

    def _report(self, state: dict[str, Any], name: str) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            torch.save(state, Path(folder, name))  # noqa: TID251 - what the peer's users write
            ray.train.report({"step": self.training.step}, checkpoint=Checkpoint.from_directory(folder))


class RayShards(RayRankZero):
    """Ray Train's guide for sharded training: every rank saves its share and reports it."""

    name = "ray-shards"

    def save(self) -> None:
        rank, world = self.training.rank, self.training.world
        named = list(self.training.model.named_parameters())[rank::world]
        state = {
            "model": {name: parameter.detach() for name, parameter in named},
            "optimizer": {name: self.training.optimizer.state[parameter] for name, parameter in named},
        }
        self._report(state, f"state-{rank}.pt")


class DcpThread(Way):
    """`torch.distributed.checkpoint.async_save` with a thread that writes, and buffers used again."""

    name = "dcp-thread"
    kind = AsyncCheckpointerType.THREAD
    shared = False

    def __init__(self, training: Training, folder: Path, store: str = "") -> None:
        super().__init__(training, folder, store)
        # Pinned memory, and copying in the background, need CUDA.
        self._stager = DefaultStager(StagingOptions(False, self.shared, False, False))
        # Writing exchanges messages beside training's own, so it needs a group of its own.
        self._group = dist.new_group(backend="gloo")
        self._future: Future[Any] | None = None

    def save(self) -> None:
        model, optimizer = get_state_dict(self.training.model, self.training.optimizer)
        answer = dcp.async_save(
            {"model": model, "optimizer": optimizer},
            checkpoint_id=self.folder / TURN.format(self.training.step),
            async_checkpointer_type=self.kind,
            async_stager=self._stager,
            process_group=self._group,
        )
        assert isinstance(answer, Future), "without background staging there is one future"
        self._future = answer

    def stored(self) -> bool:
        if self._future is not None and self._future.done():
            self._future.result()
            return True
        return False

    def close(self) -> None:
        self._stager.close()


class DcpProcess(DcpThread):
    """The same with a process that writes, out of shared memory."""

    name = "dcp-process"
    kind = AsyncCheckpointerType.PROCESS
    shared = True


class Tandem(Way):
    """Tandem's saver, as `training.worker` uses it: hashed while it is put, the manifest last."""

    name = "tandem"

    def __init__(self, training: Training, folder: Path, store: str = "") -> None:
        super().__init__(training, folder, store)
        self._failed: list[TandemError] = []
        self._saver = Saver(
            Run(open_store(self.store), "bench"),
            TrainState(training.model, training.optimizer),
            Checkpointing(every_s=60, keep=1),
            rank=training.rank,
            world=training.world,
            exchange=_store_of_its_own(training),
            newest=0,
            writer=Writer(epoch=1, generation=1),
            on_commit=lambda manifest: None,
            on_failure=self._failed.append,
        )

    def save(self) -> None:
        step = self.training.step
        self._saver.save(CheckpointMeta(step=step, cursor=step, fingerprint="bench", ledger=()))

    def stored(self) -> bool:
        if self._failed:
            raise self._failed[0]
        return not self._saver.busy

    def stepped(self, step_s: float) -> None:
        self._saver.stepped(step_s)

    def close(self) -> None:
        self._saver.close()


def _store_of_its_own(training: Training) -> dist.Store:
    """A key-value store for the group, hosted by rank 0, on this machine."""
    leads = training.rank == 0
    hosted = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if leads else None
    ports = [hosted.port if hosted else None]
    dist.broadcast_object_list(ports)
    return hosted or dist.TCPStore("127.0.0.1", ports[0] or 0, is_master=False)


WAYS: dict[str, type[Way]] = {
    way.name: way for way in (Tandem, RayRankZero, RayShards, DcpThread, DcpProcess)
}
