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
    """

    name: str = Field(pattern=r"^[^\x00-\x1f]{1,200}$")
    dtype: DataType
    shape: Annotated[tuple[int, ...], Field(min_length=1, max_length=8)]
    encoding: ImageEncoding | None = None
    nullable: bool = False

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
        return self

    def input(self, name: str) -> Tensor | None:
        """The input called `name`, if there is one."""
        return next((tensor for tensor in self.inputs if tensor.name == name), None)
