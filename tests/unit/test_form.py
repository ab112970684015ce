"""Which requests may share a batch, padding, and outputs cut back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import BadInput
from cluster.signature import Signature, Tensor
from serving.batching.form import Form


def signature(*inputs: Tensor, follows: str | None = "ids", padding_out: bool = False) -> Signature:
    output = Tensor(name="tags", dtype="INT64", shape=(-1, -1), follows=follows)
    return Signature(task="t", inputs=inputs, outputs=(output,))


IDS = Tensor(name="ids", dtype="INT64", shape=(-1, -1), padding=7)
MASK = Tensor(name="mask", dtype="BOOL", shape=(-1, -1), padding=False)
OPEN = Tensor(name="ids", dtype="INT64", shape=(-1, -1))


def ids(*values: int, rows: int = 1) -> dict[str, np.ndarray]:
    return {"ids": np.array([values] * rows), "mask": np.ones((rows, len(values)), bool)}


def test_a_fixed_shape_is_one_size() -> None:
    form = Form(
        Signature(task="t", inputs=(Tensor(name="x", dtype="FP32", shape=(-1, 4)),), outputs=(IDS_OUT,))
    )
    size = form.size({"x": np.zeros((3, 4), np.float32)})
    assert (size.length, size.octave, size.shape) == (0, None, None)


IDS_OUT = Tensor(name="y", dtype="FP32", shape=(-1,))


def test_without_a_padding_only_equal_shapes_share() -> None:
    form = Form(signature(OPEN))
    assert not form.pads
    assert form.size(ids(1, 2)).shape != form.size(ids(1, 2, 3)).shape


def test_without_follows_an_output_of_varying_length_keeps_requests_apart() -> None:
    assert not Form(signature(IDS, follows=None)).pads


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_one_class_never_wastes_more_than_an_eighth(first: int, second: int) -> None:
    form = Form(signature(IDS))
    sizes = [form.size({"ids": np.zeros((1, n), np.int64)}) for n in (first, second)]
    assert sizes[0].length == first
    if sizes[0].octave == sizes[1].octave:
        assert min(first, second) >= 0.87 * max(first, second)


def test_joined_fills_up_at_the_end_and_parted_cuts_back() -> None:
    form = Form(signature(IDS, MASK))
    pieces = [ids(1, 2, 3), ids(4, rows=2)]
    joined = form.joined(pieces)
    assert joined["ids"].tolist() == [[1, 2, 3], [4, 7, 7], [4, 7, 7]]
    assert joined["mask"].tolist() == [[True] * 3, [True, False, False], [True, False, False]]
    parted = form.parted({"tags": joined["ids"] * 10}, pieces, [1, 2])
    assert [own["tags"].tolist() for own in parted] == [[[10, 20, 30]], [[40], [40]]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "x", "dtype": "FP32", "shape": (-1, 4), "padding": 0},
        {"name": "x", "dtype": "UINT8", "shape": (-1, -1), "padding": 256},
        {"name": "x", "dtype": "INT8", "shape": (-1, -1), "padding": 0.5},
        {"name": "x", "dtype": "BYTES", "shape": (-1, -1), "padding": 0},
        {"name": "x", "dtype": "BOOL", "shape": (-1, -1), "padding": 0},
    ],
)
def test_a_padding_that_the_tensor_cannot_hold_is_refused(wrong: dict) -> None:
    with pytest.raises((BadInput, ValueError)):
        Tensor(**wrong)


def test_an_output_follows_an_input_with_as_many_free_axes() -> None:
    fixed = Tensor(name="x", dtype="FP32", shape=(-1, 4))
    for follows in ("nobody", "x"):
        with pytest.raises((BadInput, ValueError)):
            signature(fixed, follows=follows)


def test_signatures_written_before_are_still_read() -> None:
    old = '{"name": "x", "dtype": "FP32", "shape": [-1, -1], "encoding": null, "nullable": false}'
    assert Tensor.model_validate_json(old).padding is None
