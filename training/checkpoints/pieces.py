"""Training state as named tensors, and tensors as pieces that any number of ranks can write and read.

State is a flat set of named tensors: `model/NAME` (parameters and buffers) and `optimizer/NAME/KEY`. A
*piece* is rows [start, stop) along the first axis of one of them; a scalar is one row. What every rank
holds whole (DDP, buffers, step counts) is cut so that each rank writes an even share of the bytes;
what is sharded already (FSDP2's DTensors) is written by whoever holds it, as it is. A reader of another
world size, or of another strategy, copies the rows that it needs out of the pieces that have them.

A tensor that goes by several names (tied weights) is kept once, under the first; whoever loads it ties
it again, because the model's own code does.

Knows tensors, not files, stores or steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor, Shard

from cluster.errors import BadInput, shown

MODEL, OPTIMIZER = "model", "optimizer"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""By the names that safetensors gives them."""
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Spec(NamedTuple):
    """What a tensor is as a whole, however it is held."""

    dtype: str
    """As in safetensors: `F32`, `BF16`, `I64`, …"""
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """How many rows it can be cut into; a scalar is one."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        """Size of one row, in bytes."""
        return self.torch_dtype.itemsize * torch.Size(self.shape[1:]).numel()

    @property
    def size_bytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]


class Piece(NamedTuple):
    """Rows [start, stop) of the tensor called `name`."""

    name: str
    start: int
    stop: int

    @property
    def key(self) -> str:
        """What it is called in a file: `model/conv.weight@0:512`."""
        return f"{self.name}@{self.start}:{self.stop}"


class Held(NamedTuple):
    """The rows of one tensor that this rank has, from `first` on."""

    name: str
    spec: Spec
    first: int
    local: torch.Tensor
    """Shape (rows, …), or () for a scalar; shares memory with the state."""
    is_sharded: bool
    """Whether other ranks hold other rows; else every rank holds all of them."""

    @property
    def last(self) -> int:
        """The row after the last one that is here."""
        return self.first + (len(self.local) if self.spec.shape else 1)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the whole tensor, which must be here."""
        return self.local[start - self.first : stop - self.first] if self.spec.shape else self.local


class Part(NamedTuple):
    """A piece together with its data, which shares memory with the state."""

    piece: Piece
    spec: Spec
    """Of the whole tensor."""
    data: torch.Tensor

    @property
    def size_bytes(self) -> int:
        return (self.piece.stop - self.piece.start) * self.spec.row_bytes


def held_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> list[Held]:
    """Everything that makes up a training state, as this rank has it; the same names on every rank.

    Raises:
        BadInput: the state holds something that is not a tensor, or is sharded in a way not supported.
    """
    held = held_model(model)
    if optimizer is not None:
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        held += [
            hold(f"{OPTIMIZER}/{names[id(parameter)]}/{key}", torch.as_tensor(value))
            for parameter, values in optimizer.state.items()
            for key, value in values.items()
        ]
    return held


def held_model(model: torch.nn.Module) -> list[Held]:
    """The model's parameters and persistent buffers, each tensor once. See `held_state`."""
    held, seen = [], set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor):
            raise BadInput(
                f"the model's state has '{name}', which is not a tensor",
                got=shown(type(tensor).__name__),
                allowed="parameters and buffers",
                fix="let get_extra_state return a tensor, or leave it out",
            )
        if id(tensor) not in seen:
            seen.add(id(tensor))
            held.append(hold(f"{MODEL}/{name}", tensor))
    return held


def hold(name: str, tensor: torch.Tensor) -> Held:
    """What this rank has of one tensor.

    Raises:
        BadInput: a dtype that files can't hold, or a DTensor that is not sharded by rows over one axis.
    """
    if tensor.dtype not in _NAMES:
        raise BadInput(
            f"'{name}' can't be kept in a checkpoint",
            got=str(tensor.dtype),
            allowed=", ".join(sorted(_DTYPES)),
        )
    spec = Spec(_NAMES[tensor.dtype], tuple(tensor.shape))
    if not isinstance(tensor, DTensor):
        return Held(name, spec, 0, tensor.detach(), False)
    with torch.no_grad():
        local = tensor.to_local()
    if all(placement.is_replicate() for placement in tensor.placements):
        return Held(name, spec, 0, local, False)
    if tuple(tensor.placements) != (Shard(0),):
        raise BadInput(
            f"'{name}' is sharded in a way that checkpoints don't know",
            got=shown(tensor.placements),
            allowed="rows over one axis of ranks, as fully_shard does by default",
            fix="use a one-dimensional device mesh and no shard_placement_fn",
        )
    mesh = tensor.device_mesh
    each = -(-spec.rows // mesh.size())
    return Held(name, spec, min(mesh.get_local_rank() * each, spec.rows), local, True)


def share(held: Sequence[Held], rank: int, world: int) -> list[Part]:
    """What rank `rank` of `world` writes: all ranks' shares together are every row exactly once.

    The order is the model before the optimizer and wide dtypes before narrow ones, so that pieces
    laid one after another stay aligned.
    """
    ordered = sorted(held, key=lambda h: (h.name.partition("/")[0], -h.spec.torch_dtype.itemsize, h.name))
    total = sum(h.spec.size_bytes for h in ordered if not h.is_sharded)
    begin, end = total * rank // world, total * (rank + 1) // world
    parts = []
    offset = 0
    for h in ordered:
        if h.is_sharded:
            start, stop = h.first, h.last
        elif h.spec.size_bytes:
            start, stop = (_row_at(bound - offset, h.spec) for bound in (begin, end))
            offset += h.spec.size_bytes
        else:  # it has no bytes to share out, but it exists
            start, stop = (0, h.spec.rows) if rank == 0 else (0, 0)
        if stop > start or (rank == 0 and h.spec.rows == 0):
            parts.append(Part(Piece(h.name, start, stop), h.spec, h.rows(start, stop)))
    return parts


def fill(target: Held, piece: Piece, data: torch.Tensor) -> int:
    """Copy those rows of a piece that `target` has into it.

    Args:
        data: of shape (stop - start, …), or () for a scalar; of the target's dtype, on any device.

    Returns:
        How many rows were copied.
    """
    start, stop = max(piece.start, target.first), min(piece.stop, target.last)
    if stop <= start:
        return 0
    rows = data[start - piece.start : stop - piece.start] if target.spec.shape else data
    target.rows(start, stop).copy_(rows)
    return stop - start


def overlaps(target: Held, piece: Piece) -> bool:
    """Whether a piece of the target's tensor has rows that the target needs."""
    return max(piece.start, target.first) < min(piece.stop, target.last)


def split(parts: Iterable[Part], limit_bytes: int) -> Iterator[list[Part]]:
    """Parts in bundles of at most `limit_bytes`, large ones cut by rows; a single row is never cut."""
    bundle: list[Part] = []
    room = limit_bytes
    for part in parts:
        start = part.piece.start
        while True:
            left = part.piece.stop - start
            fit = left if left * part.spec.row_bytes <= room else room // part.spec.row_bytes
            if fit or not bundle:
                taken = _cut(part, start, min(start + max(fit, 1), part.piece.stop))
                bundle.append(taken)
                room = max(room - taken.size_bytes, 0)
                start = taken.piece.stop
            if start == part.piece.stop:
                break
            yield bundle
            bundle, room = [], limit_bytes
    if bundle:
        yield bundle


def _cut(part: Part, start: int, stop: int) -> Part:
    if (start, stop) == (part.piece.start, part.piece.stop):
        return part
    base = part.piece.start
    return Part(Piece(part.piece.name, start, stop), part.spec, part.data[start - base : stop - base])


def _row_at(offset_bytes: int, spec: Spec) -> int:
    """The first row of a tensor that begins at `offset_bytes` of it, or later."""
    return min(max(-(-offset_bytes // spec.row_bytes), 0), spec.rows)
