"""A run's figures as Ray's metrics: what is recorded. That Ray exposes it is Ray's own."""

import pytest
from ray.util import metrics

from training.metrics import RunMetrics
from training.progress import Progress


def test_seconds_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[str, float]] = []
    monkeypatch.setattr(
        metrics.Counter, "inc", lambda _, value, tags: counted.append((tags["kind"], round(value, 6)))
    )
    run = RunMetrics("r")
    for accounts in (
        {"m0": {"compute": 5.0, "data": 1.0}},
        {"m0": {"compute": 8.0, "data": 1.0}},
        {"m0": {"compute": 7.0}},  # a moved second is not taken back: counters only rise
        {"m1": {"compute": 2.0, "no such kind": 9.0}},
    ):
        run.progress(Progress("training", accounts=accounts))
    assert counted == [("compute", 5), ("data", 1), ("compute", 3), ("compute", 2)]


def test_progress_before_the_first_loss_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[float] = []
    monkeypatch.setattr(metrics.Gauge, "set", lambda _, value: recorded.append(value))
    run = RunMetrics("r")
    run.progress(Progress("training", workers=2))
    run.progress(Progress("training", step=7, loss=0.5, samples_per_s=123.0, workers=2, checkpoint=3))
    assert recorded == [0.0, 0, 2, 0, 123.0, 0.5, 7, 2, 3]
