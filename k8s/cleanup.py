"""What a finished RayJob leaves, and for how long.

Either the operator's old way (the cluster goes after a time, the RayJob stays) or deletion rules, in stages.
Not both: it refuses that. A rule matches jobs that SUCCEEDED or a deployment that Failed, which covers
clusters that never came up; none matches a job that was stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cluster.errors import BadInput
from k8s.options import Cleanup, Job, Stages


def cleanup_fields(job: Job, *, autoscales: bool) -> dict[str, Any]:
    """Fields of a RayJob's spec.

    Raises:
        BadInput: workers are to go while the autoscaler would start them again.
    """
    if job.cleanup is None:
        return {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": job.keep_cluster_s}
    if autoscales:
        _check_workers_stay(job.cleanup)
    rules = [
        *_rules(job.cleanup.succeeded, {"jobStatus": "SUCCEEDED"}),
        *_rules(job.cleanup.failed, {"jobDeploymentStatus": "Failed"}),
    ]
    return {"shutdownAfterJobFinishes": False, "deletionStrategy": {"deletionRules": rules}}


def _rules(stages: Stages, when: dict[str, str]) -> Iterator[dict[str, Any]]:
    policies = (
        ("DeleteWorkers", stages.workers_s),
        ("DeleteCluster", stages.cluster_s),
        ("DeleteSelf", stages.record_s),
    )
    for policy, after_s in policies:
        if after_s is not None:
            yield {"policy": policy, "condition": {**when, "ttlSeconds": after_s}}


def _check_workers_stay(cleanup: Cleanup) -> None:
    for how, stages in (("succeeded", cleanup.succeeded), ("failed", cleanup.failed)):
        if stages.workers_s is not None:
            raise BadInput(
                f"'job.cleanup.{how}.workers_s' can't be done",
                got="workers that come and go: the autoscaler would start them again",
                allowed="workers.min equal to workers.max, or no workers_s",
                fix="say cluster_s instead",
            )
