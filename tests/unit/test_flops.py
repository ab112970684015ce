"""Model FLOPs are those of the arithmetic, and counting them touches nothing."""

import numpy as np
import pytest
import torch
from task_facts import image_facts

from training.flops import device_peak, flops_per_row, peak_flops_per_s
from training.task import TARGET, Arrays, Task, Tensors
from training.tasks import build_task


class Linear(Task):
    """8 to 4, without pre-processing: 2·8·4 FLOPs forward, and as many for the weights' gradient."""

    branching = False

    def build_model(self) -> torch.nn.Module:
        return torch.nn.Linear(8, 4)

    def loss(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        if self.branching and batch["x"].max() > 0:
            return batch["x"].sum(1)
        return model(batch["x"]).sum(1) - batch[TARGET]

    def signature(self):  # type: ignore[no-untyped-def]
        raise NotImplementedError


def batch(rows: int) -> Arrays:
    return {"x": np.zeros((rows, 8), np.float32), TARGET: np.zeros(rows, np.float32)}


@pytest.mark.parametrize("rows", [1, 7])
def test_a_linear_layer(rows: int) -> None:
    task = Linear(None, None)  # type: ignore[arg-type]
    assert flops_per_row(task, batch(rows)) == 2 * (2 * 8 * 4)


def test_a_built_in_task_and_nothing_is_touched() -> None:
    task = build_task("image-classification", image_facts(), {})
    arrays = {**task.example_inputs(3, np.random.default_rng(0)), TARGET: np.zeros(3, np.int64)}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    flops = flops_per_row(task, arrays)
    assert torch.equal(torch.get_rng_state(), before)
    assert flops is not None
    assert flops > 3 * sum(
        p.numel() for p in task.build_model().parameters()
    )  # weights are used again and again


def test_a_model_that_looks_at_values_has_no_figure() -> None:
    task = Linear(None, None)  # type: ignore[arg-type]
    task.branching = True
    assert flops_per_row(task, batch(2)) is None


def test_peaks() -> None:
    assert peak_flops_per_s("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops_per_s("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops_per_s("NVIDIA A100-SXM4-80GB", "fp32") == 19.5e12
    assert peak_flops_per_s("NVIDIA A10G", "bf16") == 70e12
    assert peak_flops_per_s("NVIDIA L40S", "bf16") == 362e12
    assert peak_flops_per_s("NVIDIA H1000", "bf16") is None
    assert peak_flops_per_s("Some NPU", "bf16") is None
    assert device_peak(torch.device("cpu"), "fp32") == ("cpu", None)
