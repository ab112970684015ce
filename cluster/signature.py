"""A servable's signature: the tensors its graph takes and gives, and how raw values become them.

The signature and the graph together are all that serving, the gate and an edge device know of a
model. Axis 0 of every tensor is the batch. Data types are those of the Open Inference Protocol v2.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cluster.config import Frozen

DataType = Literal["BOOL", "UINT8", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES"]

NUMPY_DTYPES: dict[str, str] = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
    "BYTES": "object",  # str elements, one per string
}
"""The numpy dtype each protocol data type has inside this system."""


class ImageEncoding(Frozen):
    """The tensor is an image: encoded files are decoded to uint8 [height, width, channels].

    `cluster.images.decode` is the only decoder, in training and in serving.
    """

    kind: Literal["image"] = "image"
    height: int = Field(ge=1, le=16384)
    width: int = Field(ge=1, le=16384)
    channels: Literal[1, 3]


class Tensor(Frozen):
    """One named tensor.

    `shape` has -1 for axis 0 (the batch) and for whatever else may vary. With `nullable`, a missing
    value may stand in it: NaN in a float tensor, the empty string in a BYTES tensor.

    Requests whose inputs differ along a free axis share a batch only where every such input has a `padding`,
    the value its rows are filled up with at the end, and every output with free axes says by `follows` which
    input's free axes it has, in order: each answer is then cut back to its own request's length. The graph
    must give the same for what was there before, however much is filled up (an attention mask filled up
    with 0, for example).
    """

    name: str = Field(pattern=r"^[^\x00-\x1f]{1,200}$")
    dtype: DataType
    shape: Annotated[tuple[int, ...], Field(min_length=1, max_length=8)]
    encoding: ImageEncoding | None = None
    nullable: bool = False
    padding: bool | int | float | str | None = None
    follows: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Tensor:
        if self.shape[0] != -1 or any(n < -1 or n == 0 for n in self.shape):
            raise ValueError(f"a shape whose first axis is -1 and others -1 or positive, not {self.shape}")
        if self.encoding is not None:
            image = self.encoding
            if (self.dtype, self.shape) != ("UINT8", (-1, image.height, image.width, image.channels)):
                raise ValueError("an image tensor is UINT8 [-1, height, width, channels]")
        if self.nullable and self.dtype not in ("FP16", "FP32", "FP64", "BYTES"):
            raise ValueError("only float and BYTES tensors can hold missing values")
        if (self.padding is not None or self.follows is not None) and -1 not in self.shape[1:]:
            raise ValueError("an axis beyond axis 0 that is -1, for padding or follows to mean something")
        if self.padding is not None and not _is_of(self.dtype, self.padding):
            raise ValueError(f"a padding that a {self.dtype} tensor can hold, not {self.padding!r}")
        return self


class Signature(Frozen):
    """What a graph takes and gives. `labels` are a classifier's class names, in order of its outputs."""

    task: str
    inputs: Annotated[tuple[Tensor, ...], Field(min_length=1, max_length=10_000)]
    outputs: Annotated[tuple[Tensor, ...], Field(min_length=1, max_length=100)]
    labels: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> Signature:
        for side in (self.inputs, self.outputs):
            names = [tensor.name for tensor in side]
            if len(set(names)) != len(names):
                raise ValueError("tensor names that differ from one another")
        for tensor in self.outputs:
            source = self.input(tensor.follows) if tensor.follows is not None else None
            if tensor.padding is not None or (tensor.follows is not None and source is None):
                raise ValueError(f"outputs that follow an input and have no padding, unlike '{tensor.name}'")
            if source is not None and source.shape[1:].count(-1) != tensor.shape[1:].count(-1):
                raise ValueError(f"as many free axes in '{tensor.name}' as in the input it follows")
        if any(tensor.follows is not None for tensor in self.inputs):
            raise ValueError("inputs that follow nothing")
        return self

    def input(self, name: str) -> Tensor | None:
        """The input called `name`, if there is one."""
        return next((tensor for tensor in self.inputs if tensor.name == name), None)


def _is_of(dtype: DataType, value: bool | int | float | str) -> bool:
    """Whether a tensor of that type can hold the value."""
    if dtype == "BYTES" or isinstance(value, str):
        return dtype == "BYTES" and isinstance(value, str)
    if dtype == "BOOL" or isinstance(value, bool):
        return dtype == "BOOL" and isinstance(value, bool)
    if dtype in ("FP16", "FP32", "FP64"):
        return True
    bits = int(dtype.removeprefix("U").removeprefix("INT"))
    least, most = (0, 2**bits - 1) if dtype.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return isinstance(value, int) and least <= value <= most
