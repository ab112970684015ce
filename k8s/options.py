"""How jobs and services run: when a job begins and what it leaves, when it is repeated, how services move on.

A part of the settings (`k8s.settings`), with the operator's rules about what can't be had together, so that
they are told where they were written and not after an hour in a queue.
"""

from __future__ import annotations

from typing import Annotated, Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import Field, field_validator, model_validator

from cluster.config import Frozen
from k8s.cron import checked_cron

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
DnsLabel = Annotated[str, Field(pattern=rf"^{_LABEL}$", max_length=63)]
DnsSubdomain = Annotated[str, Field(pattern=rf"^{_LABEL}(\.{_LABEL})*$", max_length=253)]

_TAKEN_PORTS = {6379, 8000, 8080, 8265, 8404, 9101}
"""Of a pod: the head's state, requests, metrics, the dashboard, and HAProxy's own two."""


class Stages(Frozen):
    """What goes how long after the end, the smaller before the larger; None keeps it."""

    workers_s: int | None = Field(None, ge=0, lt=2**31)
    """The workers' pods alone; not where the autoscaler would start them again."""
    cluster_s: int | None = Field(0, ge=0, lt=2**31)
    record_s: int | None = Field(None, ge=0, lt=2**31)
    """The RayJob itself, with its submitter and its log. Applying the same file again then runs it again."""

    @model_validator(mode="after")
    def _check(self) -> Stages:
        times = [one for one in (self.workers_s, self.cluster_s, self.record_s) if one is not None]
        if not times:
            raise ValueError("one of workers_s, cluster_s, record_s at least: else GPUs are kept for ever")
        if times != sorted(times):
            raise ValueError("workers_s at most cluster_s, at most record_s")
        return self


class Cleanup(Frozen):
    """Staged clean-up, by how a job ended."""

    succeeded: Stages = Stages()
    failed: Stages = Stages(cluster_s=3600)
    """Its cluster stays for a while, to be looked at."""


class Kueue(Frozen):
    """Waits in a queue until there is quota for the whole job. Kueue itself suspends and releases it."""

    queue: DnsSubdomain
    """A LocalQueue of the namespace."""
    priority_class: DnsSubdomain | None = None
    """A WorkloadPriorityClass."""


class Gang(Frozen):
    """All pods of a cluster are placed at once or not at all, by the scheduler the operator was given."""

    queue: DnsSubdomain | None = None
    scheduler: Literal["volcano", "yunikorn", "kai-scheduler", "scheduler-plugins"] = "volcano"
    priority_class: DnsSubdomain | None = None

    @model_validator(mode="after")
    def _check(self) -> Gang:
        if self.queue is None and self.scheduler == "kai-scheduler":
            raise ValueError("a queue with scheduler kai-scheduler, which places nothing without one")
        if self.queue is not None and self.scheduler == "scheduler-plugins":
            raise ValueError("no queue with scheduler-plugins, which has none")
        return self


class Job(Frozen):
    """How often a RayJob is tried, for how long, when it may begin, and what it leaves."""

    retries: int = Field(3, ge=0, le=100)
    """New clusters after the first; each resumes from the newest checkpoint in the store. Where trying again
    can't help (bad input, a gate that refuses) there is none, unless `cleanup` is given."""
    keep_cluster_s: int = Field(0, ge=0, lt=2**31)
    """How long the cluster of a finished job stays, GPUs and all. The RayJob stays until it is deleted."""
    cleanup: Cleanup | None = None
    """Instead of `keep_cluster_s`. The operator (1.7) has no rule for a job that was stopped, so with this a
    job that can't succeed fails, and is tried again like any other."""
    deadline_s: int | None = Field(None, ge=1, lt=2**31)
    """Over all attempts; None means no end."""
    start_deadline_s: int | None = Field(None, ge=1, lt=2**31)
    """Until the driver runs; None means waiting for nodes as long as it takes."""
    kueue: Kueue | None = None
    gang: Gang | None = None

    @model_validator(mode="after")
    def _check(self) -> Job:
        if self.cleanup and "keep_cluster_s" in self.model_fields_set:
            raise ValueError("keep_cluster_s or cleanup, not both")
        if self.cleanup and self.kueue:
            raise ValueError("no cleanup with kueue: the operator refuses what is suspended and has rules")
        if self.kueue and self.gang:
            raise ValueError("kueue or gang, not both: each wants to say when the job begins")
        return self


class Schedule(Frozen):
    """When a recipe is trained again, each time as a run of its own."""

    cron: str
    """`MINUTE HOUR DAY MONTH WEEKDAY`, or `@daily` and the like."""
    time_zone: str = "Etc/UTC"
    """A name of the IANA database. Without one in the image, only UTC is known."""
    by: Literal["CronJob", "RayCronJob"] = "CronJob"
    """RayCronJob needs the operator's gate of that name, and knows neither concurrency nor a history."""
    concurrency: Literal["Allow", "Forbid", "Replace"] = "Forbid"
    """Whether a run begins while the one before goes on: beside it, not at all, or in its place."""
    keep_succeeded: int = Field(3, ge=0, le=1000)
    keep_failed: int = Field(3, ge=0, le=1000)
    late_s: int = Field(3600, ge=10, lt=2**31)
    """A run that couldn't begin for so long is left out."""
    suspended: bool = False

    @field_validator("cron")
    @classmethod
    def _check_cron(cls, cron: str) -> str:
        return checked_cron(cron)

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError("a time zone such as Europe/Berlin") from None
        return name

    @model_validator(mode="after")
    def _check(self) -> Schedule:
        lost = self.model_fields_set & {"keep_succeeded", "keep_failed", "late_s"}
        if self.by == "RayCronJob" and (self.concurrency != "Allow" or lost):
            raise ValueError(
                "concurrency: Allow, and no keep_succeeded, keep_failed or late_s, with by: RayCronJob,"
                " which has none of them; by: CronJob has"
            )
        return self


class Gateway(Frozen):
    """Upgrades that move traffic step by step, by the Gateway API. `class` must exist in the cluster."""

    gateway_class: DnsSubdomain = Field(alias="class")
    step_percent: int = Field(10, ge=1, le=100)
    interval_s: int = Field(30, ge=1, lt=2**31)
    """Between two steps. The operator looks at readiness, not at latency or errors."""
    surge_percent: int = Field(50, ge=1, le=100)
    """Of a cluster's size, by which both together may be larger."""

    @model_validator(mode="after")
    def _check(self) -> Gateway:
        if self.step_percent > self.surge_percent:
            raise ValueError(f"step_percent at most surge_percent ({self.surge_percent})")
        return self


class Serving(Frozen):
    """How a RayService is upgraded and reached."""

    upgrade: Literal["new-cluster", "incremental", "none"] | None = None
    """None: incremental where a `gateway` is given and the service scales, else a new cluster at once."""
    gateway: Gateway | None = None
    old_cluster_s: int = Field(60, ge=0, lt=2**31)
    """How long the old cluster stays once traffic has moved."""
    unready_s: int | None = Field(None, ge=1, lt=2**31)
    """A new service that isn't ready by then is given up for good (it must be deleted); None waits."""
    haproxy: bool = True
    """HAProxy before the replicas; else Serve's own proxy."""
    grpc_port: int | None = Field(None, ge=1024, le=9999)
    """Where the Open Inference Protocol is answered over gRPC as well; None: nowhere."""

    @model_validator(mode="after")
    def _check(self) -> Serving:
        if self.upgrade == "incremental" and self.gateway is None:
            raise ValueError("a gateway with upgrade: incremental")
        if self.gateway is not None and self.upgrade in ("new-cluster", "none"):
            raise ValueError(f"no gateway with upgrade: {self.upgrade}")
        if self.grpc_port in _TAKEN_PORTS:
            raise ValueError(f"a grpc_port that Ray leaves free: none of {sorted(_TAKEN_PORTS)}")
        return self
