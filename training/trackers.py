"""TensorBoard's and MLflow's files and calls. Each is on where its package is installed.

TensorBoard (tensorboardX comes with Ray Train): event files in the run's own folder of the store,
`runs/RUN/tensorboard/`, so `tensorboard --logdir STORE/runs` shows every run, of a bucket too where
TensorBoard can read it. Object stores can't append, so each half minute is a file of its own; TensorBoard
reads a folder's files one after another.

MLflow (`pip install mlflow`): the server that MLFLOW_TRACKING_URI names, with MLflow's own variables for
credentials; without one, `mlflow.db` in a store that is a folder. An experiment is called after the
model, a run after the run; a run that is continued goes on in the same one.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import struct
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from cluster.location import Location
from cluster.runs import Run
from cluster.storage import Store
from training.tracking import Point, Tracker

_RUN_TAG = "tandem.run"
_SETTINGS = ("MLFLOW_", "DO_NOT_TRACK")
_METRICS_A_CALL = 1000  # MLflow's limit
_PARAM_CHARS = 500
_PARAMS_A_CALL = 100


def settings(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What processes elsewhere need to reach the same trackers, credentials included."""
    return {name: value for name, value in environment.items() if name.startswith(_SETTINGS)}


def take_settings(settings: Mapping[str, str], environment: MutableMapping[str, str] = os.environ) -> None:
    """Go by another process's `settings`."""
    environment.update(settings)


def openers(
    run: Run,
    attempt: str,
    environment: MutableMapping[str, str] = os.environ,
    *,
    adds_only: bool = False,
) -> list[Callable[[], Tracker | None]]:
    """What `training.tracking.Tracking` opens for a run.

    Args:
        attempt: unique to the process and its generation.
        adds_only: what is written outdates no older figure of its step or of later ones, as it does
            after a rollback.
        environment: where MLflow's settings are; MLflow's reports to its makers are turned off in it,
            unless it says otherwise itself.
    """
    return [
        lambda: _tensorboard(run.store, run.prefix, attempt, adds_only),
        lambda: _mlflow(run, environment),
    ]


def _tensorboard(store: Store, prefix: str, attempt: str, adds_only: bool) -> Tracker | None:
    if importlib.util.find_spec("tensorboardX") is None:
        return None
    return TensorBoard(store, prefix, attempt, adds_only=adds_only)


def _mlflow(run: Run, environment: MutableMapping[str, str]) -> Tracker | None:
    if importlib.util.find_spec("mlflow") is None:
        return None
    uri = tracking_uri(run.store.uri, environment)
    if uri is None:
        return None
    if "DO_NOT_TRACK" not in environment:
        environment.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    return MLflow(uri, run)


def tracking_uri(store: str, environment: Mapping[str, str]) -> str | None:
    """Where MLflow's figures go; None where nobody has said, and the store is no folder."""
    named = environment.get("MLFLOW_TRACKING_URI")
    if named:
        return named
    where = Location.parse(store)
    return f"sqlite:////{where.prefix}/mlflow.db" if where.scheme == "file" else None


class TensorBoard:
    """Writes TensorBoard's event files into a store."""

    name = "TensorBoard"

    def __init__(self, store: Store, prefix: str, attempt: str, *, adds_only: bool = False) -> None:
        self._adds_only = adds_only
        self._store = store
        self._prefix = f"{prefix}/tensorboard"
        self._attempt = attempt
        self._files = 0

    def write(self, points: Sequence[Point]) -> None:
        """One file. Its beginning says from which step on older files no longer count, if any."""
        protos: Any = importlib.import_module("tensorboardX.proto.event_pb2")
        summaries: Any = importlib.import_module("tensorboardX.proto.summary_pb2")
        start_s, first = points[0].at.timestamp(), min(point.step for point in points)
        log = protos.SessionLog(status=protos.SessionLog.START)
        events = [protos.Event(wall_time=start_s, file_version="brain.Event:2")]
        if not self._adds_only:
            events.append(protos.Event(wall_time=start_s, step=first, session_log=log))
        for point in points:
            values = [summaries.Summary.Value(tag=tag, simple_value=x) for tag, x in point.figures.items()]
            summary = summaries.Summary(value=values)
            events.append(protos.Event(wall_time=point.at.timestamp(), step=point.step, summary=summary))
        self._files += 1
        # Sorted by name, files are in order of time, and so are attempts: that is how TensorBoard reads them.
        name = f"events.out.tfevents.{int(start_s):010d}.{self._attempt}.{self._files:05d}"
        self._store.put(f"{self._prefix}/{name}", b"".join(_record(e.SerializeToString()) for e in events))

    def close(self, finished: bool) -> None:
        """Each file is whole already."""


def _record(data: bytes) -> bytes:
    """One TFRecord: its length, the length's check sum, the data, the data's check sum."""
    checked: Any = importlib.import_module("tensorboardX.record_writer")
    length = struct.pack("<Q", len(data))
    sums = [struct.pack("<I", checked.masked_crc32c(part)) for part in (length, data)]
    return length + sums[0] + data + sums[1]


class MLflow:
    """Logs to one MLflow run, which is made when it isn't there.

    Raises, as every method here: whatever MLflow does.
    """

    name = "MLflow"

    def __init__(self, uri: str, run: Run) -> None:
        tracking: Any = importlib.import_module("mlflow.tracking")
        self._entities: Any = importlib.import_module("mlflow.entities")
        record = run.record()
        self._client = tracking.MlflowClient(uri)
        self._id = self._found(record.model, run.name)
        if self._id is None:
            self._id = self._made(record.model, run.name)
            self._tell_recipe(record.recipe)
        else:
            self._client.update_run(self._id, status="RUNNING")

    def write(self, points: Sequence[Point]) -> None:
        """Log every figure with its time and its step."""
        metrics = [
            self._entities.Metric(tag, value, int(point.at.timestamp() * 1000), point.step)
            for point in points
            for tag, value in point.figures.items()
        ]
        for start in range(0, len(metrics), _METRICS_A_CALL):
            self._client.log_batch(self._id, metrics=metrics[start : start + _METRICS_A_CALL])

    def close(self, finished: bool) -> None:
        """An attempt that ends without a result leaves the run open: the next one continues it."""
        if finished:
            self._client.set_terminated(self._id, "FINISHED")

    def _experiment(self, model: str) -> str:
        found = self._client.get_experiment_by_name(model)
        return str(found.experiment_id if found else self._client.create_experiment(model))

    def _found(self, model: str, name: str) -> str | None:
        filtered = f"tags.`{_RUN_TAG}` = '{name}'"
        found = self._client.search_runs([self._experiment(model)], filtered, max_results=1)
        return str(found[0].info.run_id) if found else None

    def _made(self, model: str, name: str) -> str:
        made = self._client.create_run(self._experiment(model), tags={_RUN_TAG: name}, run_name=name)
        return str(made.info.run_id)

    def _tell_recipe(self, recipe: Mapping[str, Any]) -> None:
        params = [self._entities.Param(key, value[:_PARAM_CHARS]) for key, value in _flat(recipe).items()]
        for start in range(0, len(params), _PARAMS_A_CALL):
            self._client.log_batch(self._id, params=params[start : start + _PARAMS_A_CALL])


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Nested settings as `outer.inner`: text; those that aren't set are left out."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{key}.")
        elif value is not None:
            flat[f"{before}{key}"] = str(value)
    return flat
