"""Training state as files, and a writer that commits them while training goes on.

    weights.safetensors      the model's parameters and buffers, by name
    optimizer.safetensors    the optimizer's tensors, as `PARAMETER/KEY`

Everything else a resumed run needs is in the manifest's `meta`: the step, the cursor, and the
ledger of row ranges consumed along the committed line. Random state is not stored, because every
random number is a function of the step (training.loop).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save

from cluster.config import Frozen
from cluster.errors import Damaged, StorageError, TandemError, shown
from cluster.manifest import Artifacts, Manifest
from cluster.runs import Run
from training.loop import TrainState

WEIGHTS = "weights.safetensors"
OPTIMIZER = "optimizer.safetensors"


class Segment(Frozen):
    """Rows [start, stop) of the training order, counted by the cursor, consumed by one attempt."""

    start: int
    stop: int
    attempt: str
    workers: int


class CheckpointMeta(Frozen):
    """What a checkpoint's manifest records beside the files."""

    step: int
    cursor: int
    fingerprint: str
    """Of the dataset: a position means nothing in another one."""
    ledger: tuple[Segment, ...]

    def extended(self, *, step: int, cursor: int, attempt: str, workers: int) -> CheckpointMeta:
        """This, with the rows up to `cursor` added as consumed by `attempt`."""
        ledger = self.ledger
        start = self.cursor
        if ledger and (ledger[-1].attempt, ledger[-1].workers) == (attempt, workers):
            start, ledger = ledger[-1].start, ledger[:-1]
        if cursor > start:
            ledger = (*ledger, Segment(start=start, stop=cursor, attempt=attempt, workers=workers))
        return CheckpointMeta(step=step, cursor=cursor, fingerprint=self.fingerprint, ledger=ledger)


class Restored(NamedTuple):
    """What a run goes on from: checkpoint `number` (0: none), and the newest number taken, whole or not."""

    number: int
    head: int
    meta: CheckpointMeta


def is_finite(state: TrainState) -> bool:
    """Whether the state is worth keeping: every loss so far and every weight is finite."""
    return bool(state.finite) and all(bool(p.isfinite().all()) for p in state.model.parameters())


def state_files(state: TrainState) -> dict[str, bytes]:
    """A snapshot of the model and the optimizer, independent of what training does next."""
    weights = {name: tensor.detach().contiguous() for name, tensor in state.model.state_dict().items()}
    return {WEIGHTS: save(_unshared(weights)), OPTIMIZER: save(_optimizer_tensors(state))}


def load_state(state: TrainState, meta: CheckpointMeta, read: Callable[[str], bytes]) -> None:
    """Put a checkpoint's tensors into `state`.

    Args:
        read: gives a file's verified bytes.

    Raises:
        Damaged: the tensors aren't those of this model.
    """
    device = next(state.model.parameters()).device
    try:
        state.model.load_state_dict(load(read(WEIGHTS)))
        _load_optimizer(state, load(read(OPTIMIZER)), device)
    except (RuntimeError, KeyError, ValueError) as error:
        raise Damaged(
            "the checkpoint's tensors are not those of this model",
            got=shown(str(error).split("\n", 1)[0]),
            fix="the task's code or options changed since: start a new run, or go back to the old code",
        ) from None
    state.step, state.cursor = meta.step, meta.cursor


def restore(
    state: TrainState, artifacts: Artifacts, on_damage: Callable[[int, Exception], None]
) -> Restored | None:
    """Load the newest whole checkpoint into `state`; None where there is no checkpoint.

    Raises:
        Damaged: checkpoints were committed, but none is whole; starting over is the user's decision.
    """

    def load_one(manifest: Manifest) -> CheckpointMeta:
        meta = CheckpointMeta.model_validate(manifest.meta)
        load_state(state, meta, lambda name: artifacts.read_file(manifest, name))
        return meta

    head = artifacts.head()
    if head == 0:
        return None
    found = artifacts.newest(load_one, on_damage, head)
    if found is None:
        raise Damaged(
            "no checkpoint of the run is whole",
            got=f"{head} damaged or deleted checkpoints",
            fix="restore the store from a backup, or start a new run",
        )
    return Restored(found[0].number, head, found[1])


def _optimizer_tensors(state: TrainState) -> dict[str, torch.Tensor]:
    names = {id(parameter): name for name, parameter in state.model.named_parameters()}
    return {
        f"{names[id(parameter)]}/{key}": torch.as_tensor(value).detach().contiguous()
        for parameter, values in state.optimizer.state.items()
        for key, value in values.items()
    }


def _load_optimizer(state: TrainState, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    parameters = dict(state.model.named_parameters())
    state.optimizer.state.clear()
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        # AdamW keeps its step count on the CPU.
        target = tensor if key == "step" else tensor.to(device)
        state.optimizer.state[parameters[name]][key] = target


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses tensors that share memory (tied weights); each gets a copy of its own."""
    seen: set[int] = set()
    unshared = {}
    for name, tensor in tensors.items():
        unshared[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return unshared


class CheckpointWriter:
    """Commits checkpoints from a thread, one at a time, while training goes on.

    A store that fails costs a checkpoint, not the run: the next one tries again. A `Conflict`
    (another driver writes this run) ends it.
    """

    def __init__(
        self,
        run: Run,
        *,
        newest: int,
        keep: int,
        on_commit: Callable[[Manifest], None],
        on_failure: Callable[[TandemError], None],
    ) -> None:
        self._run = run
        self._artifacts = run.checkpoints()
        self._number = newest
        self._keep = keep
        self._on_commit = on_commit
        self._on_failure = on_failure
        self._fatal: Exception | None = None
        self._waiting: queue.Queue[tuple[dict[str, bytes], dict[str, Any]] | None] = queue.Queue(1)
        self._thread = threading.Thread(target=self._work, name="checkpoint-writer", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is still being written; the next one had better wait."""
        return self._waiting.unfinished_tasks > 0

    def submit(self, files: dict[str, bytes], meta: CheckpointMeta) -> None:
        """Hand over a snapshot; returns at once if the writer is not busy.

        Raises:
            Conflict: another driver committed to this run.
        """
        self._raise_if_fatal()
        self._waiting.put((files, meta.model_dump(mode="json")))

    def finish(self, files: dict[str, bytes], meta: CheckpointMeta) -> None:
        """Commit a last snapshot and wait until it stands.

        Raises:
            StorageError: the store failed; the run isn't finished.
            Conflict: another driver committed to this run.
        """
        self._waiting.join()
        self._raise_if_fatal()
        self._commit(files, meta.model_dump(mode="json"))
        self.close()

    def close(self) -> None:
        """Let what is being written finish, then end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            try:
                self._commit(*item)
            except StorageError as error:
                self._on_failure(error)
            except Exception as error:  # noqa: BLE001 - a thread's edge: raised again by the next submit
                self._fatal = error
            finally:
                self._waiting.task_done()
        self._waiting.task_done()

    def _commit(self, files: dict[str, bytes], meta: dict[str, Any]) -> None:
        manifest = self._artifacts.commit(self._number + 1, files, meta)
        self._number = manifest.number
        self._on_commit(manifest)
        self._retire(manifest.number - self._keep)

    def _retire(self, number: int) -> None:
        """Delete the files of one old checkpoint; its manifest stays, as the record of what was done."""
        if number < 1:
            return
        try:
            old = self._artifacts.read(number)
            self._run.store.delete(entry.key for entry in old.files.values())
        except TandemError as error:
            self._on_failure(error)

    def _raise_if_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal
