"""A service: which models are served, by how many replicas, within which limits. The YAML a user writes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from cluster.config import Frozen
from cluster.errors import TandemError
from cluster.names import ModelRef, Name
from cluster.storage import Location

_CPU_HOUR, _GPU_HOUR = 0.05, 2.5
"""Dollars; near what clouds ask for a core with its memory, and for a small data centre GPU with its host."""


class Replicas(Frozen):
    """How many replicas of a model run, and what each may use."""

    min: int = Field(1, ge=0, le=10_000)
    max: int = Field(1, ge=1, le=10_000)
    cpus: float = Field(1, ge=0, le=1024)
    gpus: float = Field(0, ge=0, le=64)
    idle_s: float = Field(60, ge=1, le=86_400)
    """Without a request for so long, the last replica is stopped, where `min` is 0."""
    cost_per_hour: float | None = Field(None, gt=0, le=1e6)
    """Of one replica, in any currency; None: some list prices of its CPUs and GPUs."""

    @model_validator(mode="after")
    def _check(self) -> Replicas:
        if self.min > self.max:
            raise ValueError(f"min at most max ({self.max}), not {self.min}")
        return self

    @property
    def price(self) -> float:
        """What one replica costs an hour."""
        return self.cost_per_hour or self.cpus * _CPU_HOUR + self.gpus * _GPU_HOUR or _CPU_HOUR


class ServedModel(Frozen):
    """One model of a service."""

    model: str
    """`NAME@ALIAS` (followed as the alias moves) or `NAME@VERSION` (fixed)."""
    replicas: Replicas = Replicas()
    other_replicas: Replicas | None = None
    """A second kind of replica, such as on GPUs; how many of each run, their prices decide. A request that
    comes when there is none of either starts one of `replicas`."""
    slo_ms: float = Field(1000, gt=0)
    """The latency a request should be answered in."""
    max_batch_size: int = Field(64, ge=1, le=65_536)
    """Rows run at once."""
    max_queue_rows: int = Field(1024, ge=1)
    """Rows waiting in a replica; further requests get 503 with Retry-After."""
    max_body_bytes: int = Field(64 * 1024 * 1024, ge=1024)
    pooled: bool = False
    """Whether it lives in the service's `pool`, in replicas that many models share."""

    @field_validator("model")
    @classmethod
    def _check_ref(cls, value: str) -> str:
        try:
            return str(ModelRef.parse(value))
        except TandemError as error:
            raise ValueError(f"NAME@ALIAS or NAME@VERSION, {error.allowed}") from None

    @model_validator(mode="after")
    def _check(self) -> ServedModel:
        if self.max_queue_rows < self.max_batch_size:
            raise ValueError(
                f"max_queue_rows ({self.max_queue_rows}) at least max_batch_size ({self.max_batch_size}),"
                " or full batches could never form"
            )
        # Equality, since a service that was written out and read again has every field.
        if self.pooled and (self.replicas != Replicas() or self.other_replicas is not None):
            raise ValueError(
                "a pooled model has no replicas of its own: say pool.replicas, or leave pooled away"
            )
        return self

    @property
    def kinds(self) -> tuple[Replicas, ...]:
        """Its one kind of replica, or both; none where it is pooled."""
        if self.pooled:
            return ()
        return (self.replicas,) if self.other_replicas is None else (self.replicas, self.other_replicas)

    @property
    def ref(self) -> ModelRef:
        """The model and the alias or version served."""
        return ModelRef.parse(self.model)


class PoolSettings(Frozen):
    """Replicas that many models share; each keeps as many of them loaded as fit, the last used first."""

    replicas: Replicas = Replicas()
    memory_gib: float = Field(gt=0, le=100_000)
    """What the models that one replica has loaded may take together, by the size of their files."""

    @model_validator(mode="after")
    def _check(self) -> PoolSettings:
        if self.replicas.min < 1:
            raise ValueError("replicas.min at least 1: the pool answers for the whole server, too")
        return self

    @property
    def memory_bytes(self) -> int:
        """`memory_gib` in bytes."""
        return int(self.memory_gib * 2**30)


class LogSettings(Frozen):
    """What of its requests a service writes down (`serving.request_log`)."""

    sample: float = Field(0.01, ge=0, le=1)
    """The share of requests."""
    errors: bool = True
    """Whether answers of 500 and above are written besides."""
    errors_per_s: float = Field(10, gt=0, le=10_000)
    """How many of those a replica writes, at most."""


class TracingSettings(Frozen):
    """Where spans go, and of which requests (`serving.tracing`)."""

    endpoint: str | None = None
    """The OTLP collector, such as `http://collector:4318`; None: what the environment says, else no spans."""
    sample: float = Field(0.0, ge=0, le=1)
    """Of requests that come without a trace, the share that begins one."""


class Service(Frozen):
    """What to serve."""

    name: Name = "tandem"
    store: str
    models: Annotated[tuple[ServedModel, ...], Field(min_length=1, max_length=100)]
    pool: PoolSettings | None = None
    """Where models that say `pooled: true` live."""
    follow_every_s: float = Field(1.0, gt=0, le=3600)
    """How often replicas look whether their alias has moved."""
    drain_s: float = Field(20, ge=0, le=3600)
    """How long a replica that is told to stop may take to answer what it has accepted."""

    cache_gib: float = Field(20, ge=0, le=100_000)
    """Disk that large graphs may take on each node, shared by its replicas; 0: each replica reads its own."""
    keys: Literal["auto", "required", "off"] = "auto"
    """Whether callers need an API key of the store (`tandem keys`). `auto`: they do, unless the service
    listens on loopback only."""

    log: LogSettings = LogSettings()
    tracing: TracingSettings = TracingSettings()

    @field_validator("store")
    @classmethod
    def _check_store(cls, value: str) -> str:
        try:
            return Location.parse(value).uri
        except TandemError as error:
            raise ValueError(f"{error.allowed} ({error.failed})") from None

    @model_validator(mode="after")
    def _check(self) -> Service:
        names = [model.ref.model for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError("each model once")
        if self.pool is None and self.pooled:
            raise ValueError(f"a pool, since {self.pooled[0].model} says pooled: true")
        if self.pool is not None and not self.pooled:
            raise ValueError("a model that says pooled: true, or no pool")
        if any(model.slo_ms / 1000 > self.drain_s for model in self.models if self.drain_s):
            raise ValueError(f"drain_s ({self.drain_s}) at least every slo_ms, or accepted requests are cut")
        return self

    @property
    def pooled(self) -> tuple[ServedModel, ...]:
        """The models of the pool."""
        return tuple(served for served in self.models if served.pooled)

    @property
    def own(self) -> tuple[ServedModel, ...]:
        """The models that have replicas of their own."""
        return tuple(served for served in self.models if not served.pooled)

    @property
    def kinds(self) -> tuple[Replicas, ...]:
        """Every kind of replica that it runs: its models', and the pool's."""
        owns = tuple(kind for served in self.models for kind in served.kinds)
        return owns if self.pool is None else (*owns, self.pool.replicas)
