"""Models' signatures, small files and one check that the protocol's tests share."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from cluster.errors import TandemError
from cluster.signature import ImageEncoding, Signature, Tensor

CLASSES = tuple("0123456789")
CLASSIFIER_OUTPUTS = (
    Tensor(name="label", dtype="BYTES", shape=(-1,)),
    Tensor(name="probabilities", dtype="FP32", shape=(-1, 10)),
)
VALUE_OUTPUT = (Tensor(name="value", dtype="FP32", shape=(-1,)),)


def single(dtype: str = "FP32", row_shape: tuple[int, ...] = (4,), *, nullable: bool = False) -> Signature:
    """A regressor with one input, `x`."""
    tensor = Tensor(name="x", dtype=dtype, shape=(-1, *row_shape), nullable=nullable)
    return Signature(task="test", inputs=(tensor,), outputs=VALUE_OUTPUT)


def digits(channels: int = 1) -> Signature:
    """A classifier of 8 x 8 images."""
    encoding = ImageEncoding(height=8, width=8, channels=channels)
    image = Tensor(name="image", dtype="UINT8", shape=(-1, 8, 8, channels), encoding=encoding)
    return Signature(task="test", inputs=(image,), outputs=CLASSIFIER_OUTPUTS, labels=CLASSES)


def table() -> Signature:
    """A regressor over two columns that may be missing and two that may not."""
    return Signature(
        task="test",
        inputs=(
            Tensor(name="age", dtype="FP32", shape=(-1,), nullable=True),
            Tensor(name="city", dtype="BYTES", shape=(-1,), nullable=True),
            Tensor(name="rooms", dtype="INT64", shape=(-1,)),
            Tensor(name="owner", dtype="BOOL", shape=(-1, 1)),
        ),
        outputs=VALUE_OUTPUT,
    )


def picture_file(pixels_HW: np.ndarray, format: str = "PNG") -> bytes:
    """An image file of uint8 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW).save(buffer, format)
    return buffer.getvalue()


SOME_PIXELS = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
SOME_PNG = picture_file(SOME_PIXELS)


def refused(parse: Callable[..., object], *args: object) -> TandemError:
    """The error that `parse` raises, with all of its four parts."""
    with pytest.raises(TandemError) as caught:
        parse(*args)
    assert set(caught.value.parts()) == {"failed", "got", "allowed", "fix"}, caught.value
    assert len(str(caught.value)) < 3000
    return caught.value
