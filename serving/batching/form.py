"""Which requests may share a batch, and how their tensors become one.

Requests of equal shapes always may. Where the signature leaves an axis beyond axis 0 free (-1), requests that
differ along it may only if it says with what to fill up (`padding`, at the end of the axis) for every such
input, and for every output with a free axis, which input's length it has (`follows`): then each request's
output is cut back to its own length. Otherwise equal shapes share a batch and others don't.

Lengths are put into classes, five to the octave, so that a class wastes at most an eighth on padding.
Pure: arrays in, arrays out.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.signature import NUMPY_DTYPES, Signature, Tensor

Arrays = dict[str, NDArray[Any]]
CLASSES_PER_OCTAVE = 5


@dataclass(frozen=True, slots=True)
class Size:
    """What of a request's shapes matters for batching."""

    length: int
    """Elements of one row in the inputs that may be padded; 0 where nothing is padded."""
    octave: int | None
    """The class of its length; None where nothing is padded."""
    shape: Hashable
    """What else must be equal to share a batch; None for nothing."""


_FIXED = Size(0, None, None)


class Form:
    """The shapes of one model. Without a signature, requests are taken to have equal shapes."""

    def __init__(self, signature: Signature | None = None) -> None:
        inputs = signature.inputs if signature else ()
        outputs = signature.outputs if signature else ()
        self._free = [tensor for tensor in inputs if _free_axes(tensor)]
        self.varies = bool(self._free)
        """Whether rows of different requests may have different sizes."""
        padded = all(tensor.padding is not None for tensor in self._free) and all(
            tensor.follows is not None for tensor in outputs if _free_axes(tensor)
        )
        self.pads = bool(self._free) and padded
        """Whether requests of different lengths share a batch."""
        self._cut = {t.name: t for t in outputs if t.follows is not None} if self.pads else {}
        self._padding = {tensor.name: tensor for tensor in self._free} if self.pads else {}

    def size(self, inputs: Arrays) -> Size:
        """What of these inputs' shapes matters for batching."""
        if not self._free:
            return _FIXED
        shapes = tuple(inputs[tensor.name].shape[1:] for tensor in self._free)
        length = sum(math.prod(shape) for shape in shapes)
        if not self.pads:
            return Size(length, None, shapes)
        classes = tuple(
            _class(inputs[tensor.name].shape[axis]) for tensor in self._free for axis in _free_axes(tensor)
        )
        if len(set(classes)) == 1:
            return Size(length, classes[0], None)
        return Size(length, None, classes)  # several lengths of their own: only those alike in each

    def joined(self, pieces: Sequence[Arrays]) -> Arrays:
        """Pieces one after the other along axis 0, filled up to the longest."""
        if len(pieces) == 1:
            return pieces[0]
        return {name: self._join(name, [piece[name] for piece in pieces]) for name in pieces[0]}

    def parted(self, outputs: Arrays, pieces: Sequence[Arrays], rows: Sequence[int]) -> list[Arrays]:
        """A batch's outputs as those of each piece, cut back to its own length."""
        stops = list(accumulate(rows))
        return [
            {name: self._own(name, array[stop - count : stop], piece) for name, array in outputs.items()}
            for piece, count, stop in zip(pieces, rows, stops, strict=True)
        ]

    def _join(self, name: str, arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
        tensor = self._padding.get(name)
        if tensor is None or all(array.shape[1:] == arrays[0].shape[1:] for array in arrays):
            return np.concatenate(arrays)
        longest = [max(sizes) for sizes in zip(*(array.shape[1:] for array in arrays), strict=True)]
        rows = sum(len(array) for array in arrays)
        whole = np.full((rows, *longest), tensor.padding, NUMPY_DTYPES[tensor.dtype])
        start = 0
        for array in arrays:
            where = (slice(start, start + len(array)), *(slice(0, n) for n in array.shape[1:]))
            whole[where] = array
            start += len(array)
        return whole

    def _own(self, name: str, array: NDArray[Any], piece: Arrays) -> NDArray[Any]:
        """An output's rows, its free axes cut to those of the input that it follows."""
        tensor = self._cut.get(name)
        if tensor is None:
            return array
        assert tensor.follows is not None
        source = self._padding[tensor.follows]
        lengths = [piece[tensor.follows].shape[axis] for axis in _free_axes(source)]
        where = [slice(None)] * array.ndim
        for axis, length in zip(_free_axes(tensor), lengths, strict=True):
            where[axis] = slice(0, length)
        return array[tuple(where)]


def _free_axes(tensor: Tensor) -> list[int]:
    """The axes beyond the batch that the signature leaves open."""
    return [axis for axis, size in enumerate(tensor.shape) if axis and size == -1]


def _class(size: int) -> int:
    return math.ceil(CLASSES_PER_OCTAVE * math.log2(max(size, 1)))
