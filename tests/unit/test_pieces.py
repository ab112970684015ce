"""Any state, cut for any number of writers, comes back whole for any number of readers."""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import BadInput
from training.checkpoints.arena import FILE_BYTES, Arena, reserved_bytes
from training.checkpoints.pieces import (
    Held,
    Part,
    Piece,
    fill,
    held_model,
    held_state,
    hold,
    overlaps,
    share,
    split,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
SHAPES = st.one_of(
    st.just(()),
    st.lists(st.integers(0, 7), min_size=1, max_size=3).map(tuple),
    st.tuples(st.integers(1, 300), st.integers(1, 3)),
)
STATES = st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES), min_size=1, max_size=8)


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bit pattern that stays itself when copied."""
    size = torch.Size(shape).numel()
    numbers = torch.randint(0, 2 if dtype == torch.bool else 120, (size,), generator=torch.manual_seed(seed))
    return numbers.to(dtype).reshape(shape)


def state_of(described: list[tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    kinds = ("model", "optimizer")
    return {f"{kinds[n % 2]}/t{n}": tensor_of(*of, seed=n) for n, of in enumerate(described)}


def held_by_reader(name: str, whole: torch.Tensor, rank: int, world: int) -> Held:
    """What FSDP2 gives a rank: rows in chunks of equal size, the last ones short or empty."""
    spec = hold(name, whole).spec
    each = -(-spec.rows // world)
    first = min(rank * each, spec.rows)
    empty = torch.full((min(each, spec.rows - first), *whole.shape[1:]), 1).to(whole.dtype)
    return Held(name, spec, first, empty, True)


@given(STATES, st.integers(1, 5), st.integers(1, 4), st.integers(1, 400))
@settings(max_examples=80, deadline=None)
def test_a_state_comes_back_at_any_world_size(
    described: list[tuple[torch.dtype, tuple[int, ...]]], writers: int, readers: int, limit: int
) -> None:
    state = state_of(described)
    held = [hold(name, tensor) for name, tensor in state.items()]
    shares = [share(held, rank, writers) for rank in range(writers)]
    written = [part for of_rank in shares for bundle in split(of_rank, limit) for part in bundle]

    rows = Counter(dict.fromkeys(state, 0))
    for part in written:
        rows[part.piece.name] += part.piece.stop - part.piece.start
    assert rows == {h.name: h.spec.rows for h in held}
    assert len({part.piece for part in written}) == len(written)

    for rank in range(readers):
        for name, tensor in state.items():
            if tensor.ndim == 0:
                target = hold(name, torch.zeros_like(tensor))
            else:
                target = held_by_reader(name, tensor, rank, readers)
            found = [part for part in written if part.piece.name == name and overlaps(target, part.piece)]
            assert sum(fill(target, part.piece, part.data) for part in found) == target.last - target.first
            expected = tensor if tensor.ndim == 0 else tensor[target.first : target.last]
            assert torch.equal(target.local, expected)


@given(STATES, st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_shares_are_even_to_a_row(described: list[tuple[torch.dtype, tuple[int, ...]]], world: int) -> None:
    held = [hold(name, tensor) for name, tensor in state_of(described).items()]
    total = sum(h.spec.size_bytes for h in held)
    widest = max(h.spec.row_bytes for h in held)
    for rank in range(world):
        mine = sum(part.size_bytes for part in share(held, rank, world))
        assert abs(mine - total / world) <= 1 + widest


@given(STATES, st.integers(1, 400))
@settings(max_examples=50, deadline=None)
def test_bundles_keep_to_their_limit(
    described: list[tuple[torch.dtype, tuple[int, ...]]], limit: int
) -> None:
    parts = share([hold(name, tensor) for name, tensor in state_of(described).items()], 0, 1)
    bundles = list(split(parts, limit))
    for bundle in bundles:
        size = sum(part.size_bytes for part in bundle)
        only_row = len([part for part in bundle if part.size_bytes]) == 1
        assert size <= limit or only_row
    assert sum(part.size_bytes for bundle in bundles for part in bundle) == sum(p.size_bytes for p in parts)


@given(STATES, st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_the_arena_holds_files_that_safetensors_reads(
    described: list[tuple[torch.dtype, tuple[int, ...]]], world: int
) -> None:
    state = state_of(described)
    held = [hold(name, tensor) for name, tensor in state.items()]
    arena = Arena()
    try:
        for rank in range(world):
            parts = share(held, rank, world)
            files = arena.hold(parts, rank)
            assert sum(file.size_bytes for file in files) <= reserved_bytes(parts)
            for file in files:
                read = safetensors.torch.load(os.pread(arena.fd, file.size_bytes, file.offset))
                assert set(read) == {piece.key for piece in file.pieces}
                for piece in file.pieces:
                    whole = state[piece.name]
                    expected = whole[piece.start : piece.stop] if whole.ndim else whole
                    assert torch.equal(read[piece.key], expected)
    finally:
        os.close(arena.fd)


def test_a_second_snapshot_takes_the_place_of_the_first_and_keeps_its_form() -> None:
    weights = torch.arange(12.0).reshape(3, 4)
    arena = Arena()
    try:
        parts = share([hold("model/w", weights)], 0, 1)
        first = arena.hold(parts, 0)
        weights += 1
        assert arena.hold(parts, 0) is first
        (file,) = first
        read = safetensors.torch.load(os.pread(arena.fd, file.size_bytes, file.offset))
        assert torch.equal(read["model/w@0:3"], weights)
        larger = torch.zeros(FILE_BYTES // 4 + 3)
        files = arena.hold(share([hold("model/w", larger)], 0, 1), 0)
        assert [file.name for file in files] == ["model-00000-000.safetensors", "model-00000-001.safetensors"]
        header = os.pread(arena.fd, 8, files[0].offset)
        assert json.loads(os.pread(arena.fd, int.from_bytes(header, "little"), files[0].offset + 8))
    finally:
        os.close(arena.fd)


def test_tied_weights_are_kept_once() -> None:
    model = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(4, 4, bias=False), "b": torch.nn.Linear(4, 4, bias=False)}
    )
    model["b"].weight = model["a"].weight
    assert [h.name for h in held_model(model)] == ["model/a.weight"]


def test_an_optimizer_is_named_after_its_parameters() -> None:
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    names = {h.name for h in held_state(model, optimizer)}
    assert {"model/weight", "model/bias", "optimizer/weight/exp_avg", "optimizer/bias/step"} <= names


def test_a_non_contiguous_tensor_is_written_in_the_order_of_its_rows() -> None:
    image = torch.arange(2 * 3 * 4 * 5.0).reshape(2, 3, 4, 5).to(memory_format=torch.channels_last)
    (part,) = share([hold("model/w", image)], 0, 1)
    arena = Arena()
    try:
        (file,) = arena.hold([part], 0)
        read = safetensors.torch.load(os.pread(arena.fd, file.size_bytes, file.offset))
        assert torch.equal(read[part.piece.key], image)
    finally:
        os.close(arena.fd)


def test_what_files_cannot_hold_is_refused() -> None:
    with pytest.raises(BadInput, match="complex"):
        hold("model/z", torch.zeros(2, dtype=torch.complex128))

    class WithExtra(torch.nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"a": 1}

    with pytest.raises(BadInput, match="_extra_state"):
        held_model(WithExtra(1, 1))


def test_a_piece_is_named_by_its_rows() -> None:
    assert Piece("model/a@b", 2, 5).key == "model/a@b@2:5"
    weights = torch.zeros(4, 2)
    assert Part(Piece("model/w", 0, 4), hold("model/w", weights).spec, weights).size_bytes == 32
