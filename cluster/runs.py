"""Where a run keeps its things, and the two records it writes of itself.

runs/RUN/run.json                      what was asked for; written once, when the run starts
runs/RUN/checkpoints/00000001/…        training state (cluster.artifacts)
runs/RUN/servables/00000001/…          exported graphs (cluster.artifacts)
runs/RUN/events/…                      what happened (cluster.events)
runs/RUN/result.json                   how it ended; rewritten by each attempt that ends
"""

from __future__ import annotations

import secrets
from datetime import datetime
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

from cluster.artifacts import Artifacts
from cluster.clock import SYSTEM_CLOCK, Clock
from cluster.config import Frozen
from cluster.errors import Damaged, NotFound, shown
from cluster.names import check_name
from cluster.storage import Store

RUNS = "runs"


class RunRecord(Frozen):
    """What a run was asked to do. `facts` are what every attempt must agree on about the data."""

    run: str
    model: str
    recipe: dict[str, Any]
    facts: dict[str, Any]
    created_at: datetime
    release: str
    """The Tandem release that started the run."""


class RunResult(Frozen):
    """How a run ended; also the last line of `tandem train --json`."""

    run: str
    model: str
    version: int | None
    store: str
    metrics: dict[str, float]
    steps: int
    samples_per_s: float
    gate: Literal["passed", "failed"]


R = TypeVar("R", bound=Frozen)


class Run:
    """One run's corner of a store.

    Whatever reads a record raises `Damaged` where its file isn't what Tandem wrote.
    """

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.name = check_name(name, "run")
        self.prefix = f"{RUNS}/{name}"

    def start(self, record: RunRecord) -> RunRecord:
        """Write the record, or return the one that an earlier attempt wrote."""
        key = f"{self.prefix}/run.json"
        if self.store.put_if_absent(key, record.model_dump_json(indent=1).encode()):
            return record
        return self._read(RunRecord, "run.json")

    def record(self) -> RunRecord:
        """What the run was asked to do.

        Raises:
            NotFound: there is no such run.
        """
        try:
            return self._read(RunRecord, "run.json")
        except NotFound:
            raise NotFound(
                f"no run '{self.name}' in {self.store.uri}", fix="list them: tandem runs --store URI"
            ) from None

    def finish(self, result: RunResult) -> None:
        """Record how the run ended."""
        self.store.put(f"{self.prefix}/result.json", result.model_dump_json(indent=1).encode())

    def result(self) -> RunResult | None:
        """How the run ended, None while it hasn't."""
        try:
            return self._read(RunResult, "result.json")
        except NotFound:
            return None

    def _read(self, kind: type[R], file: str) -> R:
        key = f"{self.prefix}/{file}"
        data = self.store.get(key)
        try:
            return kind.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise Damaged(
                f"'{key}' in {self.store.uri} is damaged",
                got=f"{len(data)} bytes: {f'{where}: ' if where else ''}{shown(first['msg'])}",
                allowed=f"the {file} that a run of Tandem wrote",
                fix=f"restore the file from a copy, or remove {self.prefix} and train again",
            ) from None

    def checkpoints(self) -> Artifacts:
        """The run's checkpoints."""
        return Artifacts(self.store, f"{self.prefix}/checkpoints", "checkpoint")

    def servables(self) -> Artifacts:
        """The run's servables."""
        return Artifacts(self.store, f"{self.prefix}/servables", "servable")


def new_run_name(model: str, clock: Clock = SYSTEM_CLOCK) -> str:
    """A name for a new run: readable, and unique without asking anyone."""
    return f"{model[:36]}-{clock.wall():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def run_names(store: Store) -> list[str]:
    """Names of all runs in a store, sorted."""
    return store.folders(RUNS)
