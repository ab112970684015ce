"""Memory that holds one rank's share of a checkpoint as the very bytes of its files.

A memfd, so that a process beside the trainer (the uploader) reads it without a copy. Each file
is a safetensors file of at most 32 MiB, laid out in place: header, then pieces. A snapshot is then
nothing but copies into memory that is there already, which is all that training waits for.

What was tried, 620 MB in tensors of 16 MiB, on 2 cores of an EPYC (seconds):

    copy into fresh memory (what `clone` or `safetensors.save` does)       1.9 first, then 0.23-0.39
    copy into a memfd whose pages don't exist yet                          1.23
    copy into pages that exist but are not in this process's page table    0.20
    copy into populated pages, 1 thread                                    0.040
    copy into populated pages, 2 threads of torch                          0.023
    `memmove` through ctypes instead of `Tensor.copy_`                     0.038, not worth its own path
    populating                                                             0.40, so it is done ahead, in a
                                                                           thread of the lowest priority

Huge pages were not tried: shared memory has none by default (`shmem_enabled` is `never`).
From CUDA, the pages are registered with the driver once, so that copies run at the bus's speed. That
path has not been measured.

Knows nothing of stores, ranks' numbers or steps.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from training.checkpoints.pieces import MODEL, OPTIMIZER, Part, Piece, Spec, split

FILE_BYTES = 32 * 1024 * 1024
"""The most that a file's tensors take, unless a single row of one takes more."""
_MADV_POPULATE_WRITE = 23
_POPULATED_AT_ONCE_BYTES = 4 * 1024 * 1024

_Form = dict[str, list[tuple[Piece, Spec]]]


@dataclass(frozen=True, slots=True)
class ArenaFile:
    """One file of a share, as it lies in the arena."""

    name: str
    offset: int
    size_bytes: int
    pieces: tuple[Piece, ...]


class Arena:
    """One process's snapshot memory. It only ever grows. Safe to use from several threads."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("tandem-checkpoint")
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._is_pinned = False
        self._lock = threading.RLock()
        self._populated_bytes = 0
        self._is_wanted = threading.Event()
        self._form: _Form | None = None
        self._files: tuple[ArenaFile, ...] = ()
        self._places: list[torch.Tensor] = []
        self._end_bytes = 0

    @property
    def size_bytes(self) -> int:
        """How much it has room for."""
        return len(self._bytes)

    def reserve(self, size_bytes: int) -> None:
        """Have room for `size_bytes`, of which no memory needs to exist yet."""
        with self._lock:
            size_bytes = _aligned(size_bytes, mmap.PAGESIZE)
            if size_bytes <= self.size_bytes:
                return
            os.ftruncate(self.fd, size_bytes)
            # The old mapping goes with the last tensor that looks into it.
            mapping = mmap.mmap(self.fd, size_bytes)
            self._unpin()
            self._bytes, self._form = torch.frombuffer(mapping, dtype=torch.uint8), None
            self._populated_bytes = 0

    def populate(self) -> None:
        """Make all of its memory exist; leaves off where a snapshot wants it. Takes 0.7 s/GB of a core."""
        while not self._is_wanted.is_set():
            with self._lock:
                if self._populated_bytes == self.size_bytes:
                    return
                self._populate_some()

    def hold(self, parts: Sequence[Part], rank: int) -> tuple[ArenaFile, ...]:
        """Copy a share into the arena, replacing what was there, as files of safetensors.

        Args:
            parts: what `training.checkpoints.pieces.share` gave this rank.
            rank: stands in the names of the files.

        Returns:
            The files; laid out anew only where the state has changed its form.
        """
        bundles = _bundles(parts, rank)
        form = {name: [(part.piece, part.spec) for part in bundle] for name, bundle in bundles.items()}
        self._is_wanted.set()
        with self._lock:
            self._is_wanted.clear()
            if form != self._form:
                self._lay_out(bundles)
                self._form = form
            while self._populated_bytes < self._end_bytes:
                self._populate_some()
            self._copy([part.data for bundle in bundles.values() for part in bundle])
            return self._files

    def _copy(self, sources: Sequence[torch.Tensor]) -> None:
        is_cuda = any(source.is_cuda for source in sources)
        if is_cuda:
            self._pin()
        for place, source in zip(self._places, sources, strict=True):
            place.copy_(source, non_blocking=is_cuda)
        if is_cuda:
            torch.cuda.current_stream().synchronize()

    def _lay_out(self, bundles: dict[str, list[Part]]) -> None:
        headers = {name: _header(bundle) for name, bundle in bundles.items()}
        files, end = [], 0
        for name, bundle in bundles.items():
            size = len(headers[name]) + sum(part.size_bytes for part in bundle)
            files.append(ArenaFile(name, end, size, tuple(part.piece for part in bundle)))
            end += _aligned(size, mmap.PAGESIZE)
        self.reserve(end)
        self._files, self._places, self._end_bytes = tuple(files), [], end
        for file in files:
            header = headers[file.name]
            at = file.offset + len(header)
            self._bytes[file.offset : at] = torch.frombuffer(bytearray(header), dtype=torch.uint8)
            for part in bundles[file.name]:
                place = self._bytes[at : at + part.size_bytes]
                self._places.append(place.view(part.spec.torch_dtype).view(part.data.shape))
                at += part.size_bytes

    def _populate_some(self) -> None:
        """Make the next few pages exist: few, because the kernel's lock on the process is held meanwhile.

        Through ctypes because the call then lets other threads run. A kernel before 5.14 refuses; then
        the first snapshot takes longer, and that is all.
        """
        start = self._populated_bytes
        size = min(_POPULATED_AT_ONCE_BYTES, self.size_bytes - start)
        address = ctypes.c_void_p(self._bytes.data_ptr() + start)
        ctypes.CDLL(None).madvise(address, ctypes.c_size_t(size), _MADV_POPULATE_WRITE)
        self._populated_bytes += size

    def _pin(self) -> None:
        """Have CUDA's driver know the pages, so that it copies into them directly."""
        if not self._is_pinned:
            cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(cuda.cudaHostRegister(self._bytes.data_ptr(), self.size_bytes, 0))
            self._is_pinned = True

    def _unpin(self) -> None:
        if self._is_pinned:
            cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            torch.cuda.check_error(cuda.cudaHostUnregister(self._bytes.data_ptr()))
            self._is_pinned = False


def reserved_bytes(parts: Sequence[Part]) -> int:
    """At most how much room a share takes, its headers included."""
    tensors = sum(part.size_bytes for part in parts)
    files = 2 + 2 * (tensors // FILE_BYTES)
    return (
        tensors
        + 256 * (len(parts) + files)
        + sum(len(part.piece.name) for part in parts)
        + files * mmap.PAGESIZE
    )


def _bundles(parts: Sequence[Part], rank: int) -> dict[str, list[Part]]:
    """What goes into which file."""
    return {
        f"{kind}-{rank:05d}-{number:03d}.safetensors": bundle
        for kind in (MODEL, OPTIMIZER)
        for number, bundle in enumerate(
            split((part for part in parts if part.piece.name.startswith(f"{kind}/")), FILE_BYTES)
        )
    }


def _header(bundle: Sequence[Part]) -> bytes:
    """What stands before the tensors: their places, as safetensors has it, padded to eight bytes."""
    places: dict[str, object] = {}
    at = 0
    for part in bundle:
        end = at + part.size_bytes
        shape = list(part.data.shape)
        places[part.piece.key] = {"dtype": part.spec.dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(places, separators=(",", ":")).encode()
    text = text.ljust(_aligned(len(text), 8))
    return len(text).to_bytes(8, "little") + text


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to
