"""What a checkpoint consists of, and how it becomes training state again, at any number of workers.

    model-RRRRR-NNN.safetensors        pieces of parameters and buffers (training.checkpoints.pieces), by rank
    optimizer-RRRRR-NNN.safetensors    pieces of the optimizer's tensors
    layout.json                        every tensor's dtype and shape, and which file has which rows

Everything else a resumed run needs is in the manifest's `meta`: the step, the cursor, and the
ledger of row ranges consumed along the committed line. Random state is not stored, because every
random number is a function of the step (training.loop).

Files are read side by side, each verified before any of it is used, and only those that hold rows which
this rank needs. Writing is `training.checkpoints.saver`'s business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import safetensors.torch
import torch
from pydantic import ValidationError

from cluster.artifacts import Artifacts
from cluster.config import Frozen
from cluster.errors import BadInput, Damaged, shown
from cluster.manifest import Manifest
from training.checkpoints.pieces import MODEL, OPTIMIZER, Held, Piece, Spec, fill, held_model, hold, overlaps
from training.loop import TrainState

LAYOUT = "layout.json"
_FILES_AT_ONCE = 4


class Segment(Frozen):
    """Rows [start, stop) of the training order, counted by the cursor, consumed by one attempt."""

    start: int
    stop: int
    attempt: str
    workers: int
    skipped: bool = False
    """Whether they were left out on purpose, because they had ruined the weights."""


class CheckpointMeta(Frozen):
    """What a checkpoint's manifest records beside the files."""

    step: int
    cursor: int
    fingerprint: str
    """Of the dataset: a position means nothing in another one."""
    ledger: tuple[Segment, ...]
    loss: float | None = None
    """The mean over the steps since the checkpoint before, where it is known."""

    def extended(
        self, *, step: int, cursor: int, attempt: str, workers: int, skipped: bool = False
    ) -> CheckpointMeta:
        """This, with the rows up to `cursor` added as consumed by `attempt`, or as left out."""
        ledger = self.ledger
        start = self.cursor
        if ledger and (ledger[-1].attempt, ledger[-1].workers, ledger[-1].skipped) == (
            attempt,
            workers,
            skipped,
        ):
            start, ledger = ledger[-1].start, ledger[:-1]
        if cursor > start:
            segment = Segment(start=start, stop=cursor, attempt=attempt, workers=workers, skipped=skipped)
            ledger = (*ledger, segment)
        return CheckpointMeta(step=step, cursor=cursor, fingerprint=self.fingerprint, ledger=ledger)


class Layout(Frozen):
    """Which tensors a checkpoint has, and which rows of them are in which file."""

    tensors: dict[str, Spec]
    files: dict[str, tuple[Piece, ...]]


class Restored(NamedTuple):
    """What a run goes on from: checkpoint `number` (0: none), and the newest number taken, whole or not."""

    number: int
    head: int
    meta: CheckpointMeta


def restore(
    state: TrainState, artifacts: Artifacts, on_damage: Callable[[int, Exception], None]
) -> Restored | None:
    """Load the newest whole checkpoint into `state`; None where there is no checkpoint.

    For one rank alone: ranks that load shards have to agree on which checkpoint is whole for all of
    them, and load it with `load_checkpoint`.

    Raises:
        Damaged: checkpoints were committed, but none is whole; starting over is the user's decision.
    """
    return _newest(lambda manifest: load_checkpoint(state, artifacts, manifest), artifacts, on_damage)


def restore_model(
    model: torch.nn.Module, artifacts: Artifacts, on_damage: Callable[[int, Exception], None]
) -> Restored | None:
    """As `restore`, but the model's tensors only: what an export needs."""

    def load(manifest: Manifest) -> CheckpointMeta:
        meta, layout = _described(artifacts, manifest)
        _load(_matching(held_model(model), layout), layout, artifacts, manifest)
        return meta

    return _newest(load, artifacts, on_damage)


def inherit(
    model: torch.nn.Module, artifacts: Artifacts, manifest: Manifest, left_out: Callable[[str], bool]
) -> None:
    """Overwrite a model's tensors with another run's, but for those that are left out.

    Args:
        left_out: whether a tensor of that name stays as it is.

    Raises:
        BadInput: a tensor is not in the checkpoint, or of another shape there.
        Damaged: a file isn't what was written.
        NotFound: a file is gone.
        StorageError: the store can't be read.
    """
    _, layout = _described(artifacts, manifest)
    held = [h for h in held_model(model) if not left_out(h.name.removeprefix(f"{MODEL}/"))]
    for h in held:
        theirs = layout.tensors.get(h.name)
        if theirs != h.spec:
            name = h.name.removeprefix(f"{MODEL}/")
            raise BadInput(
                f"'{name}' can't be taken from the version to begin with",
                got="no such tensor" if theirs is None else f"{theirs.dtype} {list(theirs.shape)}",
                allowed=f"{h.spec.dtype} {list(h.spec.shape)}",
                fix=f"add '{name}' to initialize_from.leave_out, or take the options of that version",
            )
    _load(held, layout, artifacts, manifest)


def load_checkpoint(state: TrainState, artifacts: Artifacts, manifest: Manifest) -> CheckpointMeta:
    """Load one checkpoint into `state`, whole or sharded: the rows that this rank holds, and no others.

    Raises:
        Damaged: a file isn't what was written, or the tensors aren't those of this model. `state` may
            have been overwritten in part by then.
        NotFound: a file is gone.
        StorageError: the store can't be read.
    """
    meta, layout = _described(artifacts, manifest)
    held = _matching(held_model(state.model), layout) + _fresh_optimizer(state, layout)
    _load(held, layout, artifacts, manifest)
    state.step, state.cursor = meta.step, meta.cursor
    return meta


def _newest(
    load: Callable[[Manifest], CheckpointMeta],
    artifacts: Artifacts,
    on_damage: Callable[[int, Exception], None],
) -> Restored | None:
    passed_over = 0

    def passed(number: int, error: Exception) -> None:
        nonlocal passed_over
        passed_over += 1
        on_damage(number, error)

    head = artifacts.head()
    found = artifacts.newest(load, passed, head) if head else None
    if found is not None:
        return Restored(found[0].number, head, found[1])
    if passed_over:
        raise Damaged(
            "no checkpoint of the run is whole",
            got=f"{passed_over} damaged or deleted checkpoints",
            fix="restore the store from a backup, or start a new run",
        )
    return None


def _described(artifacts: Artifacts, manifest: Manifest) -> tuple[CheckpointMeta, Layout]:
    try:
        return (
            CheckpointMeta.model_validate(manifest.meta),
            Layout.model_validate_json(artifacts.read_file(manifest, LAYOUT)),
        )
    except ValidationError as error:
        raise Damaged(
            f"checkpoint {manifest.number} is not described as checkpoints are",
            got=shown(error.errors()[0]["msg"]),
            fix="read it with the release of Tandem that wrote it",
        ) from None


def _matching(held: list[Held], layout: Layout) -> list[Held]:
    """The model's tensors, which must be those that the checkpoint has."""
    ours = {h.name: h.spec for h in held}
    theirs = {name: spec for name, spec in layout.tensors.items() if name.startswith(f"{MODEL}/")}
    if ours != theirs:
        odd = min(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        raise _other_model(odd, theirs.get(odd), ours.get(odd))
    return held


def _fresh_optimizer(state: TrainState, layout: Layout) -> list[Held]:
    """Give the optimizer tensors of the form that the checkpoint has, to be filled."""
    parameters = dict(state.model.named_parameters())
    on_device = {  # where torch keeps step counts there too
        id(parameter)
        for group in state.optimizer.param_groups
        if group.get("fused") or group.get("capturable")
        for parameter in group["params"]
    }
    state.optimizer.state.clear()
    held = []
    for name, spec in layout.tensors.items():
        kind, _, path = name.partition("/")
        if kind != OPTIMIZER:
            continue
        of, _, key = path.rpartition("/")
        parameter = parameters.get(of)
        if parameter is None:
            raise _other_model(name, spec, None)
        if key != "step" and tuple(parameter.shape) == spec.shape:
            value = torch.empty_like(parameter, dtype=spec.torch_dtype, requires_grad=False)
        else:
            device = parameter.device if key != "step" or id(parameter) in on_device else None
            value = torch.empty(spec.shape, dtype=spec.torch_dtype, device=device)
        state.optimizer.state[parameter][key] = value
        held.append(hold(name, value))
    return held


def _load(held: list[Held], layout: Layout, artifacts: Artifacts, manifest: Manifest) -> None:
    """Fill tensors from the files that have rows of them."""
    wanted = {h.name: h for h in held}
    needed = [
        name
        for name, pieces in layout.files.items()
        if any(p.name in wanted and overlaps(wanted[p.name], p) for p in pieces)
    ]

    def read(file: str) -> Counter[str]:
        tensors = safetensors.torch.load(artifacts.read_file(manifest, file))
        rows: Counter[str] = Counter()
        for piece in layout.files[file]:
            data, target = tensors.get(piece.key), wanted.get(piece.name)
            if data is None:
                raise _odd_file(manifest, file, piece)
            if target is not None:
                if data.dtype != target.local.dtype or data.shape[1:] != target.local.shape[1:]:
                    raise _odd_file(manifest, file, piece)
                rows[piece.name] += fill(target, piece, data)
        return rows

    filled: Counter[str] = Counter()
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        for rows in pool.map(read, needed):
            filled += rows
    for h in held:
        if filled[h.name] != h.last - h.first:
            raise Damaged(
                f"checkpoint {manifest.number} does not have all of '{h.name}'",
                got=f"{filled[h.name]} rows",
                allowed=f"{h.last - h.first} rows",
                fix="use an older checkpoint",
            )


def _odd_file(manifest: Manifest, file: str, piece: Piece) -> Damaged:
    return Damaged(
        f"'{manifest.files[file].key}' does not hold what its checkpoint's layout says",
        got=f"no such rows: {piece.key}",
        fix="use an older checkpoint",
    )


def _other_model(name: str, saved: Spec | None, ours: Spec | None) -> Damaged:
    def described(spec: Spec | None) -> str:
        return "nothing" if spec is None else f"{spec.dtype} {list(spec.shape)}"

    return Damaged(
        "the checkpoint's tensors are not those of this model",
        got=f"'{name}': {described(saved)}",
        allowed=described(ours),
        fix="the task's code or options changed since: start a new run, or go back to the old code",
    )
