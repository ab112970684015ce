"""A recipe that is trained again and again: a CronJob that makes RayJobs, or KubeRay's RayCronJob.

Each time is a run of its own, called as its RayJob, so that it starts anew while the attempts at one RayJob
go on where the one before ended. The CronJob's pod (`k8s.launch`) may make, read and delete RayJobs of its
namespace and nothing else; it decides about what still runs and what is kept, of which the RayCronJob of
KubeRay 1.7 knows nothing (and its operator has it switched off unless told otherwise).
"""

from __future__ import annotations

import json

from k8s.guards import metadata, service_account
from k8s.launch import RAYJOB_FILE, SCHEDULE_LABEL
from k8s.naming import content_hash, schedule_name
from k8s.options import Schedule
from k8s.pods import Manifest, Owner, launcher_template
from k8s.rayjob import job_parts, ray_job, training_owner
from k8s.settings import ClusterSettings, ServiceAccount
from training.recipe import Recipe

_JOB_DIR = "/job"


def render_schedule(
    recipe: Recipe, settings: ClusterSettings, schedule: Schedule, run: str | None = None
) -> list[Manifest]:
    """Everything that trains `recipe` on `schedule`, in the order to apply it.

    Args:
        run: what the objects are called, and the runs' names begin with.

    Raises:
        BadInput: as `k8s.rayjob.render_recipe`.
    """
    owner = training_owner(schedule_name(recipe, run), settings)
    around, spec = job_parts(recipe, owner, settings, named=None)
    if schedule.by == "RayCronJob":
        return [*around, _ray_cron_job(owner, settings, schedule, spec)]
    job = ray_job(recipe, owner, settings, spec)
    job["metadata"]["labels"][SCHEDULE_LABEL] = owner.name
    config = _config_map(owner, settings, job)
    launcher = ServiceAccount(name=f"{owner.name}-schedule")
    return [
        *around,
        config,
        *service_account(launcher, settings),
        *_rights(owner, settings, launcher.name),
        _cron_job(owner, settings, schedule, config["metadata"]["name"]),
    ]


def _ray_cron_job(owner: Owner, settings: ClusterSettings, schedule: Schedule, spec: Manifest) -> Manifest:
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCronJob",
        "metadata": metadata(owner.name, owner, settings),
        "spec": {
            "schedule": schedule.cron,
            "timeZone": schedule.time_zone,
            "suspend": schedule.suspended,
            "jobTemplate": spec,
        },
    }


def _cron_job(owner: Owner, settings: ClusterSettings, schedule: Schedule, config: str) -> Manifest:
    command = [
        "python",
        "-m",
        "k8s.launch",
        f"{_JOB_DIR}/{RAYJOB_FILE}",
        f"--concurrency={schedule.concurrency}",
        f"--keep-succeeded={schedule.keep_succeeded}",
        f"--keep-failed={schedule.keep_failed}",
    ]
    template = launcher_template(owner, settings, command)
    template["spec"]["volumes"].append({"name": "job", "configMap": {"name": config}})
    mount = {"name": "job", "mountPath": _JOB_DIR, "readOnly": True}
    template["spec"]["containers"][0]["volumeMounts"].append(mount)
    return {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": metadata(owner.name, owner, settings),
        "spec": {
            "schedule": schedule.cron,
            "timeZone": schedule.time_zone,
            "suspend": schedule.suspended,
            # Of the launchers, which end at once; what they launch is told apart by k8s.launch.
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": schedule.late_s,
            "successfulJobsHistoryLimit": 1,
            "failedJobsHistoryLimit": 3,
            "jobTemplate": {"spec": {"backoffLimit": 3, "activeDeadlineSeconds": 300, "template": template}},
        },
    }


def _config_map(owner: Owner, settings: ClusterSettings, job: Manifest) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(f"{owner.name}-rayjob-{content_hash(job)}", owner, settings),
        "immutable": True,
        "data": {RAYJOB_FILE: json.dumps(job, indent=1, sort_keys=True) + "\n"},
    }


def _rights(owner: Owner, settings: ClusterSettings, account: str) -> list[Manifest]:
    """What the launcher may do: with RayJobs, in its namespace, and with nothing else."""
    group = "rbac.authorization.k8s.io"
    described = metadata(f"{owner.name}-schedule", owner, settings)
    return [
        {
            "apiVersion": f"{group}/v1",
            "kind": "Role",
            "metadata": described,
            "rules": [
                {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["create", "list", "delete"]}
            ],
        },
        {
            "apiVersion": f"{group}/v1",
            "kind": "RoleBinding",
            "metadata": described,
            "roleRef": {"apiGroup": group, "kind": "Role", "name": described["name"]},
            "subjects": [{"kind": "ServiceAccount", "name": account, "namespace": settings.namespace}],
        },
    ]
