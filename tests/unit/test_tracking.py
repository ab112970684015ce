"""Figures reach TensorBoard and MLflow, and neither can stall or end a run."""

import importlib.util
import struct
import threading
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cluster.runs import Run, RunRecord
from cluster.storage import Store, memory_store, open_store
from training.trackers import TensorBoard, openers, settings, take_settings, tracking_uri
from training.tracking import Point, Tracking

START = datetime(2026, 1, 2, tzinfo=UTC)


class Recorder:
    """A tracker that keeps what it gets, or fails, or waits."""

    def __init__(
        self, name: str = "recorder", fails: bool = False, gate: threading.Event | None = None
    ) -> None:
        self.name = name
        self.points: list[Point] = []
        self.finished: bool | None = None
        self.tries = 0
        self._fails = fails
        self._gate = gate

    def write(self, points: Sequence[Point]) -> None:
        self.tries += 1
        if self._gate:
            self._gate.wait(60)
        if self._fails:
            raise OSError("no route to host\nand more")
        self.points += points

    def close(self, finished: bool) -> None:
        self.finished = finished


class SteppingClock:
    """Each look at the time is `step_s` later."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._now_s = 0.0

    def monotonic_s(self) -> float:
        self._now_s += self._step_s
        return self._now_s

    def wall(self) -> datetime:
        return START + timedelta(seconds=self._now_s)

    def sleep(self, duration_s: float) -> None:
        raise NotImplementedError


def track(*trackers: Recorder, step_s: float = 2.0) -> tuple[Tracking, list[str]]:
    errors: list[str] = []
    openers = [lambda tracker=tracker: tracker for tracker in trackers]
    return Tracking(openers, errors.append, SteppingClock(step_s)), errors


def test_figures_reach_every_tracker_in_order() -> None:
    first, second = Recorder(), Recorder("other")
    tracking, errors = track(first, second)
    for step in range(5):
        tracking.log(step, loss=step / 2, rate=None, bad=float("nan"))
    tracking.log(5, loss=float("inf"))
    tracking.close(finished=True, timeout_s=60)
    for tracker in (first, second):
        assert [(p.step, p.figures) for p in tracker.points] == [(n, {"loss": n / 2}) for n in range(5)]
        assert tracker.finished
    assert errors == []


def test_figures_that_come_too_often_are_thinned() -> None:
    tracker = Recorder()
    tracking, _ = track(tracker, step_s=0.25)
    for step in range(20):
        tracking.log(step, loss=1.0)
    tracking.close(timeout_s=60)
    assert [p.step for p in tracker.points] == [0, 4, 8, 12, 16]
    assert tracker.finished is False


def test_one_that_fails_is_told_once_and_the_others_go_on() -> None:
    broken, fine = Recorder("broken", fails=True), Recorder()

    def cannot_open() -> None:
        raise ImportError("no such module")

    errors: list[str] = []
    tracking = Tracking([cannot_open, lambda: broken, lambda: fine], errors.append, SteppingClock(2.0))
    tracking.log(1, loss=1.0)
    tracking.close(timeout_s=60)
    assert broken.tries == 1
    assert len(fine.points) == 1
    assert errors == [
        "a tracker did not take figures: ImportError: no such module",
        "broken did not take figures: OSError: no route to host",
    ]


def test_one_that_hangs_holds_nobody_up() -> None:
    gate = threading.Event()
    tracking, _ = track(Recorder(gate=gate))
    for step in range(10_000):
        tracking.log(step, loss=1.0)
    tracking.close(timeout_s=0.01)
    gate.set()


def test_nothing_to_write_opens_nothing() -> None:
    def open_one() -> None:
        raise AssertionError("opened")

    errors: list[str] = []
    Tracking([open_one], errors.append).close(timeout_s=60)
    assert errors == []


def points(*steps: int) -> list[Point]:
    return [Point(START + timedelta(seconds=n), n, {"loss": 1 / (n + 1), "samples/s": 100.0}) for n in steps]


def new_run(store: Store) -> Run:
    run = Run(store, "r")
    record = RunRecord(
        run="r",
        model="digits",
        recipe={"model": "digits", "optimization": {"epochs": 2}, "gate": None},
        facts={},
        created_at=START,
        release="0",
    )
    run.start(record)
    return run


def test_tensorboard_files_are_what_tensorboard_reads() -> None:
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    store = memory_store()
    tracker = TensorBoard(store, "runs/r", "a")
    tracker.write(points(1, 2))
    tracker.write(points(3))
    tracker.close(finished=True)
    keys = store.keys("runs/r/tensorboard")
    assert [key.rsplit(".", 1)[1] for key in keys] == ["00001", "00002"]
    read = []
    for key in keys:
        data = store.get(key)
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
            record = data[12 : 12 + size]
            assert struct.unpack("<I", data[12 + size : 16 + size]) == (masked_crc32c(record),)
            read.append(Event.FromString(record))
            data = data[16 + size :]
    assert read[0].file_version == "brain.Event:2"
    values = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in read if e.summary.value]
    assert values == [(n, {"loss": pytest.approx(1 / (n + 1)), "samples/s": 100}) for n in (1, 2, 3)]
    assert read[1].step == 1  # from here on, what an earlier attempt wrote doesn't count


def test_what_only_adds_outdates_nothing() -> None:
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    store = memory_store()
    for adds_only in (False, True):
        TensorBoard(store, "runs/r", f"a{adds_only}", adds_only=adds_only).write(points(3))
    starts = SessionLog(status=SessionLog.START)
    files = [store.get(key) for key in store.keys("runs/r/tensorboard")]
    found = [
        Event(step=3, wall_time=START.timestamp() + 3, session_log=starts).SerializeToString() in file
        for file in files
    ]
    assert found == [True, False]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
@pytest.mark.filterwarnings("ignore")  # theirs
def test_tensorboard_itself_reads_them(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    store = open_store(str(tmp_path))
    first, second = TensorBoard(store, "runs/r", "a"), TensorBoard(store, "runs/r", "b")
    first.write(points(1, 2, 3))
    first.write(points(4, 5))
    second.write([Point(START + timedelta(hours=1), 4, {"loss": 7.0}), *points(6)])
    read = EventAccumulator(str(tmp_path / "runs/r/tensorboard"))
    read.Reload()
    losses = [(e.step, round(e.value, 3)) for e in read.Scalars("loss")]
    assert losses == [(1, 0.5), (2, 0.333), (3, 0.25), (4, 7.0), (6, 0.143)]


def test_where_mlflow_writes() -> None:
    assert tracking_uri("file:///data/store", {}) == "sqlite:////data/store/mlflow.db"
    assert tracking_uri("s3://bucket/store", {}) is None
    named = {"MLFLOW_TRACKING_URI": "http://mlflow:5000"}
    assert tracking_uri("s3://bucket/store", named) == "http://mlflow:5000"
    assert tracking_uri("file:///data/store", named) == "http://mlflow:5000"


def test_processes_elsewhere_are_given_the_settings_of_trackers_and_no_others() -> None:
    here = {"MLFLOW_TRACKING_URI": "http://mlflow:5000", "MLFLOW_TRACKING_TOKEN": "t", "HOME": "/root"}
    there = {"HOME": "/home/ray", "MLFLOW_TRACKING_URI": "http://other"}
    take_settings(settings(here), there)
    assert there == here | {"HOME": "/home/ray"}


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
@pytest.mark.filterwarnings("ignore")  # theirs
def test_mlflow_continues_a_run(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    run = new_run(open_store(str(tmp_path)))
    errors: list[str] = []
    for steps, finished in (((1, 2), False), ((3,), True)):
        tracking = Tracking(openers(run, "a", {})[1:], errors.append, SteppingClock(2.0))
        for step in steps:
            tracking.log(step, loss=float(step))
        tracking.close(finished=finished, timeout_s=100)
    assert errors == []
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    (made,) = client.search_runs([experiment.experiment_id])
    assert (made.info.run_name, made.info.status) == ("r", "FINISHED")
    assert made.data.params == {"model": "digits", "optimization.epochs": "2"}
    history = client.get_metric_history(made.info.run_id, "loss")
    assert sorted((m.step, m.value) for m in history) == [(1, 1.0), (2, 2.0), (3, 3.0)]
