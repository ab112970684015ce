"""A run's figures as Ray's metrics, so that Ray's dashboard, Prometheus and Grafana show them.

    tandem_training_samples_per_s{run}             rows a second over all workers
    tandem_training_loss{run}                      mean loss of the latest report
    tandem_training_step{run}                      steps done
    tandem_training_workers{run}                   workers in the group
    tandem_training_checkpoint{run}                number of the newest checkpoint
    tandem_training_rank0_seconds_total{run,kind}  rank 0's time by kind (cluster.goodput)

Rank 0 stands for the others, who step with it; the whole account is `tandem runs show`'s.

To be used in a process that is Ray's, such as the coordinator's: training processes are not. Recording a
value takes a few microseconds, and never waits for anyone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.goodput import KINDS
from training.progress import Progress


class RunMetrics:
    """One run's."""

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Counter, Gauge

        def gauge(name: str, description: str) -> Any:
            made = Gauge(f"tandem_training_{name}", description, tag_keys=("run",))
            made.set_default_tags({"run": run})
            return made

        self._samples_per_s = gauge("samples_per_s", "Rows a second over all workers.")
        self._loss = gauge("loss", "Mean loss of the latest report.")
        self._step = gauge("step", "Steps done.")
        self._workers = gauge("workers", "Workers in the group.")
        self._checkpoint = gauge("checkpoint", "Number of the newest checkpoint.")
        self._seconds: Any = Counter(
            "tandem_training_rank0_seconds_total", "Rank 0's time by kind.", tag_keys=("run", "kind")
        )
        self._seconds.set_default_tags({"run": run})
        self._told: dict[str, dict[str, float]] = {}

    def progress(self, progress: Progress) -> None:
        """Record what rank 0 reports."""
        self._samples_per_s.set(progress.samples_per_s)
        if progress.loss is not None:
            self._loss.set(progress.loss)
        self._step.set(progress.step)
        self._workers.set(progress.workers)
        self._checkpoint.set(progress.checkpoint)
        for account, seconds in progress.accounts.items():
            self._account(account, seconds)

    def _account(self, name: str, seconds: Mapping[str, float]) -> None:
        """Seconds by kind since the account was opened; what was recorded of it before is taken off."""
        known = self._told.setdefault(name, {})
        for kind in KINDS:
            more_s = seconds.get(kind, 0.0) - known.get(kind, 0.0)
            if more_s > 0:
                self._seconds.inc(more_s, tags={"kind": kind})
                known[kind] = seconds[kind]
