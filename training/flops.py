"""Model FLOPs: how many a row costs, and what the device could do at most; together they give the MFU.

Counted once, on meta tensors: shapes run through the model, no numbers, so nothing of the run is
touched (parameters, gradients, the random generator) and a large model costs no memory. As usual for
model FLOPs, products of matrices, convolutions and attention count, forward and backward, and
recomputation doesn't. What it needs of torch takes a second or more to import (as compiling does), so
it is done only where there is a peak to compare with.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from cluster.events import EventWriter
from training.task import Arrays, Task


class Peak(NamedTuple):
    """Dense FLOPs a second: bf16 with fp32 accumulation, and fp32 without TF32."""

    bf16: float
    fp32: float


_PEAKS: tuple[tuple[str, Peak], ...] = (
    # NVIDIA's data sheets, dense (half of the figures "with sparsity"); the first name that fits counts.
    ("H100 NVL", Peak(835e12, 60e12)),
    ("H100 PCIe", Peak(756e12, 51e12)),
    ("H100", Peak(989.4e12, 66.9e12)),
    ("H200", Peak(989.4e12, 66.9e12)),
    ("GH200", Peak(989.4e12, 66.9e12)),
    ("A100", Peak(312e12, 19.5e12)),
    ("A10G", Peak(70e12, 31.5e12)),  # AWS's variant of the A10
    ("A10", Peak(125e12, 31.2e12)),
    ("L40S", Peak(362e12, 91.6e12)),
    ("L4", Peak(121e12, 30.3e12)),
)
"""Devices whose peak is known, by a part of the name that the driver gives."""


def peak_flops_per_s(device_name: str, precision: str) -> float | None:
    """What one device can do; None where it isn't known, as of any CPU.

    Args:
        device_name: as `torch.cuda.get_device_name()` gives it.
        precision: the recipe's, `bf16` or `fp32`.
    """
    words = device_name.replace("-", " ")
    for name, peak in _PEAKS:
        if f" {name} " in f" {words} ":
            return peak.bf16 if precision == "bf16" else peak.fp32
    return None


def device_peak(device: torch.device, precision: str) -> tuple[str, float | None]:
    """The device's name, and its peak in FLOPs a second as far as it is known."""
    if device.type != "cuda":
        return device.type, None
    name = torch.cuda.get_device_name(device)
    return name, peak_flops_per_s(name, precision)


def tell_flops(task: Task, arrays: Arrays, device: torch.device, precision: str, events: EventWriter) -> None:
    """Write a `model-flops` event, from which MFU follows, where both parts are known.

    Call it on one rank, with its first batch, before the first step.
    """
    name, peak = device_peak(device, precision)
    if peak is not None and (flops := flops_per_row(task, arrays)) is not None:
        events.write("model-flops", flops_per_row=flops, device=name, peak_flops_per_s=peak)


def flops_per_row(task: Task, arrays: Arrays) -> float | None:
    """Model FLOPs of one row's forward and backward pass.

    Args:
        arrays: of one batch of real rows, at least one: only shapes and types are used.

    Returns:
        None where shapes alone don't get through the model, such as one whose code branches on values.
    """
    batch = {name: torch.from_numpy(array[:1]).to("meta") for name, array in arrays.items()}
    try:
        with torch.device("meta"):
            model = task.build_model().train()
        with FlopCounterMode(display=False) as counter:
            task.loss(model, batch).sum().backward()  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001 - the user's code, in a place it wasn't written for; a figure is not worth a run
        return None
    return float(counter.get_total_flops())
