"""A task that writes down every row it is trained on, so that a test can count them.

Each call of `loss` appends one line to a file of this process: the ids of the rows, in order. Used
by tests as `recording_task:RecordingTask`; Ray's workers find it because tests/ is in PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import signal
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from cluster.config import Frozen
from cluster.signature import Signature, Tensor
from training.task import TARGET, Arrays, Task, Tensors


class Options(Frozen):
    log_dir: str
    step_s: float = 0.0
    """Slept in each step, so that a kill can be aimed."""
    faulty: bool = False
    """Whether `loss` has a mistake in it."""
    deadly_row: int | None = None
    """This row ruins the weights; whoever is first given it kills its process in the second step after."""


class RecordingTask(Task):
    """Linear regression of `y` on `x`; `id` tells the rows apart."""

    Options = Options
    greater_is_better = {"mae": False}
    options: Options
    _calls_left = 0

    def build_model(self) -> torch.nn.Module:
        return _Line()

    def loss(self, model: torch.nn.Module, batch: Tensors) -> torch.Tensor:
        if self.options.faulty:
            len(3)  # type: ignore[arg-type]
        path = Path(self.options.log_dir) / f"{os.getpid()}.jsonl"
        with path.open("a") as log:
            at = datetime.now(UTC).isoformat()
            log.write(json.dumps([at, *(int(n) for n in batch["id"])]) + "\n")
        time.sleep(self.options.step_s)
        loss = (model(batch["id"], batch["x"]) - batch[TARGET]) ** 2
        return loss * torch.nan if self._is_deadly(batch["id"]) else loss

    def _is_deadly(self, ids: torch.Tensor) -> bool:
        """Whether the deadly row is among these; two calls after it was, the end."""
        row, died = self.options.deadly_row, Path(self.options.log_dir) / "died"
        self._calls_left -= 1
        if self._calls_left == 0 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if row is None or row not in ids.tolist():
            return False
        self._calls_left = 2
        return True

    def signature(self) -> Signature:
        return Signature(
            task="recording",
            inputs=(
                Tensor(name="id", dtype="FP32", shape=(-1,)),
                Tensor(name="x", dtype="FP32", shape=(-1,)),
            ),
            outputs=(Tensor(name="value", dtype="FP32", shape=(-1,)),),
        )

    def metrics(self, outputs: Arrays, target: NDArray[Any]) -> dict[str, float]:
        return {"mae": float(np.abs(outputs["value"] - target).mean())}


class _Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))

    def forward(self, id: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        # `id` takes part with weight 0, so that export keeps the input.
        return self.layer(x.unsqueeze(1)).squeeze(1) + 0.0 * id


def write_line(folder: Path, rows: int, files: int = 3, poison: int | None = None) -> str:
    """A dataset y = 3x + 1 of `rows` rows in several files; its URI. Row `poison` overflows the loss."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.arange(rows, dtype=np.float32)
    x = np.random.default_rng(0).normal(size=rows).astype(np.float32)
    if poison is not None:
        x[poison] = 1e30
    table = pa.table({"id": ids, "x": x, "y": 3 * x + 1})
    per_file = -(-rows // files)
    for n in range(files):
        part = table.slice(n * per_file, per_file)
        pq.write_table(part, folder / f"part-{n}.parquet", row_group_size=max(1, per_file // 3))
    return folder.as_uri()


def consumed_along_committed_line(events: list[dict[str, Any]], log_dir: Path) -> list[list[int]]:
    """Ids of the rows of every committed step, in order of steps.

    Attempt k's steps count up to where attempt k+1 started. A process's file has a line a step, with its
    time, since a process may take part in several attempts.
    """
    starts = [e for e in events if e["event"] == "attempt-started"]
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    for start in starts:  # an attempt's ranks start in any order
        by_name.setdefault(start["attempt"], {})[start["rank"]] = start
    attempts = list(by_name.values())
    steps: list[list[int]] = []
    for n, attempt in enumerate(attempts):
        first = attempt[0]["step"]
        assert len(steps) >= first, "an attempt can't start after a gap"
        del steps[first:]
        lines = [
            _lines_from(log_dir / f"{attempt[rank]['pid']}.jsonl", attempt[rank], starts)
            for rank in sorted(attempt)
        ]
        for of_ranks in zip(*lines, strict=False):
            steps.append([row for line in of_ranks for row in line])
        assert n == len(attempts) - 1 or len(steps) >= attempts[n + 1][0]["step"]
    return steps


def _lines_from(path: Path, start: dict[str, Any], starts: list[dict[str, Any]]) -> list[list[int]]:
    """The rows of each step that a process made in one attempt."""
    later = [e["at"] for e in starts if e["pid"] == start["pid"] and e["at"] > start["at"]]
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [rows for at, *rows in lines if start["at"] <= at < min(later, default="9")]
