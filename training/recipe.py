"""A recipe: what to train, on which data, with how many workers. The YAML a user writes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cluster.config import Frozen
from cluster.errors import TandemError
from cluster.names import ModelRef, Name
from cluster.storage import Location


def _canonical(uri: str) -> str:
    try:
        return Location.parse(uri).uri
    except TandemError as error:
        raise ValueError(f"{error.allowed} ({error.failed})") from None


class Data(Frozen):
    """Folders of Parquet. Without `eval`, the gate has nothing to measure on."""

    train: str
    eval: str
    label: str = "label"
    """The column to predict."""
    cache_gib: float = Field(8, ge=0, le=100_000)
    """How much of a remote dataset each machine may keep on its disk."""

    _uris = field_validator("train", "eval")(_canonical)


class Workers(Frozen):
    """How many data-parallel workers, and what each may use."""

    min: int = Field(1, ge=1, le=10_000)
    max: int = Field(1, ge=1, le=10_000)
    cpus: float = Field(1, gt=0, le=1024)
    gpus: float = Field(0, ge=0, le=64)

    @model_validator(mode="after")
    def _check(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"min at most max ({self.max}), not {self.min}")
        return self


class Optimization(Frozen):
    """How the weights are moved: AdamW, warm-up then cosine."""

    global_batch_size: int = Field(256, ge=1)
    """Rows a step, over all workers."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows one worker runs at once; smaller than its share means gradient accumulation."""
    epochs: int = Field(1, ge=1, le=1_000_000)
    learning_rate: float = Field(1e-3, gt=0)
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1)
    """The cosine ends at this share of `learning_rate`."""
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.01, ge=0)
    gradient_clip_norm: float | None = Field(1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    seed: int = Field(0, ge=0, lt=2**63)


class Checkpointing(Frozen):
    """When training state is committed, how long the store may take, and how many checkpoints are kept."""

    every_s: Annotated[float, Field(gt=0)] | Literal["auto"] | None = 60.0
    """`auto` weighs what a save costs, as measured, against what a failure would."""
    every_steps: int | None = Field(None, ge=1)
    keep: int = Field(3, ge=1)
    """The newest so many."""
    keep_best: int = Field(0, ge=0)
    """And so many of those with the lowest training loss."""
    retry_s: float = Field(600, gt=0, le=86_400)
    """How long a store that fails is tried again before a checkpoint is given up; training goes on."""
    upload_mb_per_s: float | None = Field(None, gt=0)
    """Each worker's limit; without one, what leaves the steps undisturbed."""

    @model_validator(mode="after")
    def _check(self) -> Checkpointing:
        if self.every_s is None and self.every_steps is None:
            raise ValueError("every_s, every_steps or both: a run without checkpoints can't recover")
        return self


class Faults(Frozen):
    """When a worker counts as lost, and what is done about a batch that ruins the weights."""

    silent_s: float = Field(8, ge=2, le=3600)
    """A worker process that says nothing for so long (stopped, frozen, cut off) is replaced."""
    stuck_s: float = Field(300, ge=2, le=86_400)
    """A step that takes so long is a hang: the worker that is behind is replaced."""
    spike_factor: float | None = Field(None, gt=1)
    """A step's loss above so many times the recent median is treated as one that isn't finite."""
    skip_at_most: int = Field(3, ge=0)
    """Batches whose loss isn't finite are undone and left out; more than so many end the run."""


class Cost(Frozen):
    """What a worker costs, for the run's account."""

    per_worker_hour: float = Field(ge=0)
    currency: str = Field("USD", min_length=1, max_length=8)


class Gate(Frozen):
    """What the servable must reach on the held-out data before it becomes a version."""

    metric: str = "accuracy"
    at_least: float | None = None
    at_most: float | None = None
    no_worse_than_live_by: float | None = Field(None, ge=0)
    """How much worse than the version that `promote_to` points at it may be, on the same data."""

    @model_validator(mode="after")
    def _check(self) -> Gate:
        if self.at_least is not None and self.at_most is not None:
            raise ValueError(
                "at_least for a metric that should be high, or at_most for one that should be low"
            )
        return self


class Origin(Frozen):
    """An earlier version whose weights a network begins with. Patterns are of parameters' names: `stem.*`."""

    version: str
    """`MODEL@ALIAS` or `MODEL@NUMBER` of the same store; a run goes by what it stood for when it began."""
    leave_out: tuple[str, ...] = ()
    """What begins afresh all the same, such as a classifier's head where the classes are others."""
    freeze: tuple[str, ...] = ()
    """What isn't trained."""

    @field_validator("version")
    @classmethod
    def _check(cls, version: str) -> str:
        try:
            return str(ModelRef.parse(version))
        except TandemError as error:
            raise ValueError(f"{error.allowed} ({error.failed})") from None


class Recipe(Frozen):
    """What to train."""

    model: Name
    task: str = Field(pattern=r"^([a-z][a-z0-9-]*|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$")
    """A built-in task, or `package.module:Class`."""
    options: dict[str, Any] = {}
    """What the task itself lets one choose, such as the model's width."""
    data: Data
    store: str
    run: Name | None = None
    """The run's name; an existing run is continued. Without it, a new one is made up."""
    workers: Workers = Workers()
    optimization: Optimization = Optimization()
    checkpoint: Checkpointing = Checkpointing()
    gate: Gate | None = None
    promote_to: Name | None = None
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """Whole state on every worker, or sharded over them (FSDP2)."""
    faults: Faults = Faults()
    cost: Cost | None = None
    initialize_from: Origin | None = None
    """Fine-tuning; a bare `MODEL@ALIAS` will do."""
    max_failures: int = Field(3, ge=0)
    """Worker failures without a new checkpoint in between, after which the run gives up."""

    _store = field_validator("store")(_canonical)

    @field_validator("initialize_from", mode="before")
    @classmethod
    def _origin(cls, given: Any) -> Any:
        return {"version": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if self.optimization.global_batch_size < self.workers.max:
            raise ValueError(
                f"global_batch_size ({self.optimization.global_batch_size}) at least workers.max"
                f" ({self.workers.max}), or some workers would have nothing to do"
            )
        return self
