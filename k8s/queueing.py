"""Who decides when a job begins: labels for Kueue, or for a scheduler that places whole gangs.

Labels of the RayJob only: the operator copies them to the cluster, and its schedulers' plugins from there to
the pods. Kueue's webhook suspends a job as it is created, and Kueue releases it; `suspend` isn't written,
since each `kubectl apply` of a written one would stop the job that is running.
"""

from __future__ import annotations

from cluster.errors import BadInput
from k8s.options import Gang, Job, Kueue
from training.recipe import Recipe

_QUEUE_OF = {
    "volcano": "volcano.sh/queue-name",
    "yunikorn": "yunikorn.apache.org/queue",
    "kai-scheduler": "kai.scheduler/queue",
}


def queue_labels(job: Job, recipe: Recipe) -> dict[str, str]:
    """Labels for the RayJob of `recipe`; none where it begins at once.

    Raises:
        BadInput: the recipe's workers come and go, which the queue can't admit.
    """
    if job.kueue:
        _check_fixed(recipe)
        return _of_kueue(job.kueue)
    return _of_gang(job.gang) if job.gang else {}


def _of_kueue(kueue: Kueue) -> dict[str, str]:
    labels = {"kueue.x-k8s.io/queue-name": kueue.queue}
    if kueue.priority_class:
        labels["kueue.x-k8s.io/priority-class"] = kueue.priority_class
    return labels


def _of_gang(gang: Gang) -> dict[str, str]:
    labels = {"ray.io/gang-scheduling-enabled": "true"}
    if gang.queue:
        labels[_QUEUE_OF[gang.scheduler]] = gang.queue
    if gang.priority_class:
        labels["ray.io/priority-class-name"] = gang.priority_class
    return labels


def _check_fixed(recipe: Recipe) -> None:
    workers = recipe.workers
    if workers.min != workers.max:
        raise BadInput(
            "Kueue can't admit a job whose size changes",
            got=f"workers.min {workers.min}, workers.max {workers.max}",
            allowed="workers.min equal to workers.max",
            fix="give both the same number, or leave job.kueue out of the settings",
        )
