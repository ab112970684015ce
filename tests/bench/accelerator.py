"""Model FLOPs utilisation of `training.loop` beside a bare loop: 124M parameters, sequence 1,024, bf16.

Needs torch and the packages that configuration needs, no Ray: copy the repository to a machine with a
CUDA device and run it there. Both sides compile the model, and take the same number of steps on the same
tokens; counted after a warm-up. Without a CUDA device a tiny shape runs on the CPU, uncompiled: a test of
this program, whose figures mean nothing, so they are not printed as any.

    python -m tests.bench.accelerator [--pairs 5] [--steps 100] [--out FILE]
"""

from __future__ import annotations

import time

import torch

from cluster.goodput import Kind
from tests.bench.asked import asked, finished
from tests.bench.machine import distributions, machine_facts
from tests.bench.pairs import Comparison, Measure, Report, in_turn
from tests.bench.trainers.gpt import TINY, GptTask, Shape, random_batches
from training.flops import device_peak
from training.loop import StepReport, TrainState, new_state, train_steps
from training.recipe import Optimization

WARM_UP_STEPS = 10
AIM = 0.99
WEIGHT_DECAY = 0.1


class Still:
    """Hooks that do nothing: a save is measured by tests.bench.checkpointing."""

    def is_skipped(self, cursor: int) -> bool:
        return False

    def is_due(self, step: int) -> bool:
        return False

    def begin_step(self, step: int) -> None: ...

    def on_wrapped(self, model: torch.nn.Module) -> None: ...

    def on_forward(self) -> None: ...

    def on_backward(self) -> None: ...

    def on_step(self, step: StepReport) -> None: ...

    def switch(self, kind: Kind) -> None: ...


class Bench:
    """One model trained in two ways, and the seconds that a number of steps takes."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self._shape = shape
        self._device = device
        cuda = device.type == "cuda"
        self._settings = Optimization(
            global_batch_size=shape.rows, precision="bf16", compile=cuda, weight_decay=WEIGHT_DECAY
        )
        self._task = GptTask(shape)

    def loop(self, steps: int) -> float:
        """Seconds a step of `training.loop`."""
        state = new_state(self._task, self._settings, self._device)
        self._train(state, WARM_UP_STEPS + steps, WARM_UP_STEPS + steps)
        return self._timed_s

    def bare(self, steps: int) -> float:
        """Seconds a step of the shortest loop that a person would write."""
        torch.manual_seed(0)
        model = self._task.build_model().to(self._device)
        cuda = self._device.type == "cuda"
        called = torch.compile(model) if cuda else model
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, fused=cuda)
        clock = _Clock(self._device)
        for batch in random_batches(self._shape, WARM_UP_STEPS + steps, 0):
            if batch.cursor == WARM_UP_STEPS * self._shape.rows:
                clock.start()
            tokens_BT = torch.from_numpy(batch.arrays["tokens"])
            if cuda:
                tokens_BT = tokens_BT.pin_memory().to(self._device, non_blocking=True)
            with torch.autocast(self._device.type, torch.bfloat16):
                loss = called(tokens_BT).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return clock.elapsed_s() / steps

    def _train(self, state: TrainState, steps: int, total_steps: int) -> None:
        clock = _Clock(self._device)

        class Timed(Still):
            def begin_step(self, step: int) -> None:
                if step == WARM_UP_STEPS:
                    clock.start()

        train_steps(
            self._task,
            state,
            random_batches(self._shape, steps, state.cursor),
            self._settings,
            total_steps=total_steps,
            device=self._device,
            hooks=Timed(),
        )
        self._timed_s = clock.elapsed_s() / (steps - WARM_UP_STEPS)


class _Clock:
    """Waits for the device before it looks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started_s = 0.0

    def start(self) -> None:
        self._started_s = self._now_s()

    def elapsed_s(self) -> float:
        return self._now_s() - self._started_s

    def _now_s(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()


def main() -> int:
    chosen = asked(__doc__, steps=(int, 100, "timed in each run"))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    shape = Shape() if cuda else TINY
    name, peak = device_peak(device, "bf16")
    report = Report(
        "A 124M-parameter transformer on an accelerator",
        {**machine_facts(), "device": name},
        {"both": distributions("torch")},
    )
    bench = Bench(shape, device)
    steps = chosen.steps if cuda else 3
    found = in_turn(lambda: bench.loop(steps), lambda: bench.bare(steps), chosen.pairs if cuda else 1)
    if cuda:
        speeds = tuple((1 / ours, 1 / bare) for ours, bare in found)
        report.comparisons.append(Comparison("steps/s", "training.loop", "a bare loop", speeds, aim=AIM))
    if cuda and peak is not None:
        shares = tuple(100 * shape.flops_per_step / ours / peak for ours, _ in found)
        report.measures.append(Measure("% model FLOPs utilisation (45 aimed at)", shares))
    if not cuda:
        report.notes.append("no CUDA device here: model FLOPs utilisation is not measured")
    return finished(report, chosen)


if __name__ == "__main__":
    raise SystemExit(main())
