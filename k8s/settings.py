"""What a cluster is like: image, accounts, Secrets by name, sizes. The YAML given as `--settings`.

Recipe and service say what to train and to serve, and are the same on a laptop; this says where on
Kubernetes. It holds names of Secrets and never a value out of one, so that it and all that is
rendered from it can be kept in git.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from cluster.config import Frozen
from k8s.options import DnsLabel, DnsSubdomain, Job, Schedule, Serving

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
AccountName = Annotated[str, Field(pattern=rf"^{_LABEL}(\.{_LABEL})*$", max_length=50)]
"""Shorter than Kubernetes asks: the operator cuts longer ones, and then doesn't find the account."""
_IMAGE = re.compile(
    r"[a-zA-Z0-9][a-zA-Z0-9.:/_-]*?(:(?P<tag>[\w][\w.-]{0,127}))?(@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_SECRET_NAME = re.compile(
    r"SECRET|PASSWORD|PASSWD|TOKEN|CREDENTIAL|PRIVATE|ACCESS_KEY|ACCOUNT_KEY|API_KEY|SAS_KEY", re.I
)


_OPERATORS_OWN = ("RAY_AUTH_MODE", "RAY_REDIS_ADDRESS", "REDIS_USERNAME", "RAY_enable_autoscaler_v2")


def _nothing_secret(name: str) -> str:
    # Of the name alone, so that an error shows the name and never the value.
    if _SECRET_NAME.search(name):
        raise ValueError("nothing secret: put it into a Secret, and name that in store_secret")
    if name in _OPERATORS_OWN:
        raise ValueError("nothing that the operator sets")
    return name


EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$"), AfterValidator(_nothing_secret)]


class ServiceAccount(Frozen):
    """Who pods are. Annotations bind it to a cloud identity; `create: false` if it exists already."""

    name: AccountName
    annotations: dict[str, str] = {}
    create: bool = True


class SecretKey(Frozen):
    """One key of a Secret that exists in the namespace."""

    name: DnsSubdomain
    key: str = Field(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)


class Redis(Frozen):
    """Where the head keeps its state, so that serving outlives it."""

    address: str = Field(pattern=r"^(rediss?://)?[A-Za-z0-9.-]+:[0-9]{1,5}$")
    """`host:port`, or `rediss://host:port` for TLS; without credentials."""
    password: SecretKey | None = None


class Toleration(Frozen):
    """A taint that pods put up with; without a key, any."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None

    @model_validator(mode="after")
    def _check(self) -> Toleration:
        if self.operator == "Equal" and (self.key is None or self.value is None):
            raise ValueError("a key and a value with operator Equal")
        if self.operator == "Exists" and self.value is not None:
            raise ValueError("no value with operator Exists: say operator: Equal")
        return self


class Gpu(Frozen):
    """How GPUs are asked for."""

    resource: str = Field("nvidia.com/gpu", pattern=r"^[a-z0-9.-]+/[a-z0-9.-]*gpu$")
    """The operator counts as GPUs what ends in `gpu`."""
    product: str | None = Field(None, pattern=r"^[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$")
    """The value of the node label `RESOURCE.product`, such as NVIDIA-H100-80GB-HBM3."""
    tolerations: tuple[Toleration, ...] | None = None
    """None tolerates the taint that is usual on GPU nodes, named as the resource."""

    @property
    def tolerated(self) -> tuple[Toleration, ...]:
        """What pods with GPUs put up with."""
        usual = (Toleration(key=self.resource, effect="NoSchedule"),)
        return usual if self.tolerations is None else self.tolerations


class Head(Frozen):
    """The head's size. No worker and no replica runs there; a job's driver does."""

    cpus: int = Field(2, ge=1, le=256)
    memory_gib: int = Field(8, ge=2, le=4096)


class WorkerMemory(Frozen):
    """Memory of a worker pod: a base for Ray itself, and a share for each CPU and GPU in it."""

    base_gib: float = Field(1, gt=0, le=1024)
    per_cpu_gib: float = Field(3, gt=0, le=1024)
    per_gpu_gib: float = Field(16, ge=0, le=4096)


class ClusterSettings(Frozen):
    """Where on Kubernetes, and as whom."""

    namespace: DnsLabel = "tandem"
    image: str = "tandem-ray:0.1.0"
    """With a tag or, better, a digest: `registry/tandem@sha256:…`."""
    image_pull_secrets: tuple[DnsSubdomain, ...] = ()
    ray_version: str = Field("2.60.0", pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$")
    training_account: ServiceAccount = ServiceAccount(name="tandem-training")
    serving_account: ServiceAccount = ServiceAccount(name="tandem-serving")
    auth_secret: DnsSubdomain = "tandem-ray-auth"
    """The Secret whose key `auth_token` holds Ray's token. A stable one: else upgrades rotate it."""
    store_secret: DnsSubdomain | None = None
    """A Secret whose keys become environment variables, such as AWS_SECRET_ACCESS_KEY; None where
    the service accounts have cloud identities."""
    env: dict[EnvName, str] = {}
    """Further environment variables, none of them secret: AWS_REGION, AWS_ENDPOINT_URL."""
    redis: Redis | None = None
    head: Head = Head()
    worker_memory: WorkerMemory = WorkerMemory()
    scratch_gib: int = Field(20, ge=1, le=65_536)
    """The most a pod may write below /tmp; its root file system is read-only."""
    gpu: Gpu = Gpu()
    node_selector: dict[str, str] = {}
    tolerations: tuple[Toleration, ...] = ()
    priority_class: DnsSubdomain | None = None
    idle_timeout_s: int = Field(120, ge=1, lt=2**31)
    """After which the autoscaler removes a worker pod that has nothing to do."""
    gpu_idle_timeout_s: int | None = Field(None, ge=1, lt=2**31)
    """The same for pods with GPUs; None: as for the others."""
    job: Job = Job()
    schedule: Schedule | None = None
    """Renders a recipe to be trained again and again, instead of once."""
    serving: Serving = Serving()
    user_id: int = Field(1000, ge=1, lt=2**31)
    group_id: int = Field(1000, ge=1, lt=2**31)
    operator_namespace: DnsLabel | None = None
    """Where the KubeRay operator runs; None lets it in from any namespace, by its label."""
    monitoring_namespace: DnsLabel | None = None
    """Whose pods may read the metrics ports; None lets nobody."""

    @model_validator(mode="after")
    def _check_schedule(self) -> ClusterSettings:
        if self.schedule is None or self.schedule.by == "CronJob":
            return self
        if self.job.kueue or self.job.gang:
            raise ValueError("by: CronJob with kueue or gang: a RayCronJob gives its jobs no labels")
        kept = self.job.cleanup
        if kept is None or kept.succeeded.record_s is None or kept.failed.record_s is None:
            raise ValueError(
                "record_s in both stages of job.cleanup with by: RayCronJob, which keeps all jobs"
            )
        return self

    @field_validator("image")
    @classmethod
    def _fixed_image(cls, image: str) -> str:
        match = _IMAGE.fullmatch(image)
        if not match or not (match["digest"] or match["tag"] not in (None, "latest")):
            raise ValueError("NAME:TAG (not latest) or NAME@sha256:DIGEST, so that all pods run one code")
        return image

    @field_validator("ray_version")
    @classmethod
    def _supported_ray(cls, version: str) -> str:
        if tuple(int(part) for part in version.split(".")) < (2, 56, 0):
            raise ValueError("at least 2.56.0, the first without known remote code execution")
        return version
