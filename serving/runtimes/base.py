"""What a replica needs of whatever runs a model: arrays in, arrays out."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


class Runtime(Protocol):
    """A loaded model. `run` may be called from any thread, and from several at a time."""

    platform: str
    """What the metadata calls it, such as `onnx`."""

    def run(self, inputs: Arrays) -> Arrays:
        """Run one batch.

        Args:
            inputs: every input of the signature; axis 0 is the batch, the same in each; dtypes as
                `cluster.signature.NUMPY_DTYPES` has them (BYTES: an object array of str).

        Returns:
            Every output of the signature, with the same axis 0 and in the same form.

        Raises:
            Exception: whatever the model raises on these inputs.
        """
        ...

    def close(self) -> None:
        """Let go of memory and devices. Nothing may be run afterwards."""
        ...
