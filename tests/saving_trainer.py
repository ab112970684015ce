"""Trainers that do nothing but save: `python saving_trainer.py` forks one for each order on stdin.

The state after a step is a pure function of the step (`state_at`), so whoever loads a checkpoint can tell
whether every bit of it is right. Ranks step together, as if they exchanged gradients. What a trainer
reports stands in a file that the test maps (`Status`): it survives any kill.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch.distributed import TCPStore

from cluster.errors import Conflict
from cluster.manifest import Writer
from cluster.runs import Run
from cluster.storage import open_store
from training.checkpoints.checkpoint import CheckpointMeta
from training.checkpoints.saver import Saver
from training.loop import TrainState
from training.recipe import Checkpointing

STEP_S = 0.004
_FORMAT = struct.Struct("qqqq")
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Order:
    """One rank's orders."""

    store: str
    endpoint: str
    run: str
    rank: int
    world: int
    port: int
    epoch: int
    newest: int
    first_step: int
    status: str
    every_steps: int = 10
    retry_s: float = 60.0
    keep: int = 100


class Status:
    """Four numbers that a trainer writes and a test reads."""

    def __init__(self, path: str) -> None:
        file = Path(path)
        if not file.exists():
            file.write_bytes(bytes(_FORMAT.size))
        with file.open("r+b") as handle:
            self._memory = mmap.mmap(handle.fileno(), _FORMAT.size)

    def write(self, *, step: int, committed: int, failures: int, refused: bool) -> None:
        _FORMAT.pack_into(self._memory, 0, step, committed, failures, refused)

    @property
    def step(self) -> int:
        return int(_FORMAT.unpack_from(self._memory)[0])

    @property
    def committed(self) -> int:
        """The newest checkpoint that rank 0 was told about."""
        return int(_FORMAT.unpack_from(self._memory)[1])

    @property
    def failures(self) -> int:
        """Checkpoints that were given up."""
        return int(_FORMAT.unpack_from(self._memory)[2])

    @property
    def refused(self) -> bool:
        """Whether it ended because a newer writer had taken over."""
        return bool(_FORMAT.unpack_from(self._memory)[3])


def state_at(step: int) -> TrainState:
    """The state after a step."""
    model = torch.nn.Sequential(torch.nn.Linear(61, 203), torch.nn.BatchNorm1d(203), torch.nn.Linear(203, 64))
    state = TrainState(model, torch.optim.AdamW(model.parameters()))
    for parameter in model.parameters():
        state.optimizer.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    move_to(state, step)
    return state


def move_to(state: TrainState, step: int) -> None:
    """Change every value in `state` to what it is after `step`."""
    random = torch.Generator().manual_seed(step)
    for tensor in tensors(state).values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=random))
        else:
            tensor.fill_(step)
    state.step, state.cursor = step, 4 * step


def tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """Every tensor of a state, by name."""
    found = {name: tensor.detach() for name, tensor in state.model.state_dict().items()}
    for name, parameter in state.model.named_parameters():
        for key, value in state.optimizer.state[parameter].items():
            found[f"{name}/{key}"] = value
    return found


def train(order: Order) -> None:
    """Step and save until killed, or refused."""
    os.environ["AWS_ENDPOINT_URL"] = order.endpoint
    torch.set_num_threads(1)
    status = Status(order.status)
    group = TCPStore("127.0.0.1", order.port, is_master=False) if order.world > 1 else None
    counts = {"committed": 0, "failures": 0}
    step = order.first_step
    state = state_at(step)

    def told() -> None:
        status.write(step=step, refused=False, **counts)

    def failed(_: Exception) -> None:
        counts["failures"] += 1

    saver = Saver(
        Run(open_store(order.store), order.run),
        state,
        Checkpointing(keep=order.keep, retry_s=order.retry_s),
        rank=order.rank,
        world=order.world,
        exchange=group.clone() if group is not None else None,
        newest=order.newest,
        writer=Writer(epoch=order.epoch, generation=0),
        on_commit=lambda manifest: counts.update(committed=manifest.number),
        on_failure=failed,
    )
    try:
        while True:
            step += 1
            save = step % order.every_steps == 0 and not saver.busy
            if group is not None:
                key = f"agreed/{step}"
                if order.rank == 0:
                    group.set(key, "save" if save else "go")
                save = group.get(key) == b"save"
                group.delete_key(f"agreed/{step - 100}") if order.rank == 0 else None
            move_to(state, step)
            told()
            if save:
                saver.save(CheckpointMeta(step=step, cursor=4 * step, fingerprint="f", ledger=()))
            time.sleep(STEP_S)
    except Conflict:
        status.write(step=step, refused=True, **counts)


class Nursery:
    """The test's side: has trainers forked, and kills them."""

    def __init__(self, env: dict[str, str]) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **env, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )

    def __enter__(self) -> Nursery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.kill()  # its trainers end with it
        self._server.wait(30)
        for pipe in (self._server.stdin, self._server.stdout):
            assert pipe is not None
            pipe.close()

    def fork(self, order: Order) -> int:
        """The process id of a new trainer."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


def _serve() -> None:
    server = os.getpid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the dead need nobody's attention
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != server:
                os._exit(0)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                train(Order(**json.loads(line)))
            finally:
                sys.stderr.flush()
                os._exit(0)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
