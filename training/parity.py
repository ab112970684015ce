"""Does a servable give what its model gives? Values within 1e-4, labels that agree, types as signed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cluster.errors import BadInput, TandemError, shown
from cluster.signature import NUMPY_DTYPES, Signature, Tensor
from training.task import Arrays

TOLERANCE = 1e-4
"""The largest difference, as a share of the largest value in the batch."""


def check_parity(signature: Signature, expected: Sequence[NDArray[Any]], given: Arrays, rows: int) -> None:
    """Compare one batch.

    Args:
        signature: of the servable.
        expected: what the model gave for the outputs that aren't BYTES, in order.
        given: what the servable gave, by name.
        rows: of the batch.

    Raises:
        BadInput: an output isn't of the announced type or shape.
        TandemError: an output has another value; names it and the difference.
    """
    plain = [tensor for tensor in signature.outputs if tensor.dtype != "BYTES"]
    for tensor in signature.outputs:
        check_type(tensor, given[tensor.name], rows)
    for tensor, values in zip(plain, expected, strict=True):
        _check_values(tensor.name, values, given[tensor.name], rows)
    if signature.labels and "label" in given:
        likeliest = np.array(signature.labels, dtype=object)[given["probabilities"].argmax(axis=-1)]
        if not np.array_equal(given["label"], likeliest):
            raise _unlike("label", f"{shown(given['label'].tolist())} for a batch of {rows}", likeliest)


def check_type(tensor: Tensor, values: NDArray[Any], rows: int) -> None:
    """Is an output of the announced type and shape?

    Raises:
        BadInput: it isn't.
    """
    signed = (rows, *tensor.shape[1:])
    fits = len(values.shape) == len(signed) and all(
        n in (-1, m) for n, m in zip(signed, values.shape, strict=True)
    )
    if values.dtype.name != NUMPY_DTYPES[tensor.dtype] or not fits:
        raise BadInput(
            f"the graph's output '{tensor.name}' is not what the signature says",
            got=f"{values.dtype.name} {list(values.shape)} for a batch of {rows}",
            allowed=f"{NUMPY_DTYPES[tensor.dtype]} {list(tensor.shape)}",
            fix="correct the task's graph() or signature()",
        )


def relative_difference(expected: NDArray[Any], given: NDArray[Any]) -> float:
    """The largest difference as a share of the largest finite magnitude expected; NaN equals NaN."""
    if expected.size == 0:
        return 0.0
    expected, given = expected.astype(np.float64), given.astype(np.float64)
    same = (expected == given) | (np.isnan(expected) & np.isnan(given))
    if same.all():
        return 0.0
    difference = np.abs(expected - given)[~same]
    finite = np.abs(expected[np.isfinite(expected)])
    scale = finite.max() if finite.size and finite.max() > 0 else 1.0
    worst = float(difference.max() / scale)
    return worst if np.isfinite(worst) else float("inf")


def _check_values(name: str, expected: NDArray[Any], given: NDArray[Any], rows: int) -> None:
    if expected.shape != given.shape:
        raise _unlike(name, f"shape {list(given.shape)} for a batch of {rows}", list(expected.shape))
    worst = relative_difference(expected, given)
    if worst > TOLERANCE:
        raise _unlike(
            name, f"a relative difference of {worst:.3g} for a batch of {rows}", f"at most {TOLERANCE}"
        )


def _unlike(name: str, got: str, allowed: object) -> TandemError:
    return TandemError(
        f"the exported graph gives another '{name}' than the model",
        got=got,
        allowed=allowed if isinstance(allowed, str) else shown(allowed),
        fix="look for an operation in the model that depends on the batch, on chance or on training mode",
    )
