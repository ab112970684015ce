"""A recipe as a RayJob that may be interrupted at any point and loses no more than an interval.

The operator's retry builds a new cluster and runs the same command again, so everything an attempt
must find stands outside the cluster: the recipe in an immutable ConfigMap whose name holds its hash,
the run's name in the command line, checkpoints in the store.
"""

from __future__ import annotations

from k8s.capacity import Demand, worker_groups
from k8s.cleanup import cleanup_fields
from k8s.guards import metadata, network_policy, service_account
from k8s.naming import as_written, content_hash, run_name
from k8s.options import Job
from k8s.pods import Manifest, Owner, submitter_template
from k8s.queueing import queue_labels
from k8s.raycluster import cluster_spec
from k8s.settings import ClusterSettings
from k8s.stores import check_reachable
from k8s.yamltext import to_yaml
from training.recipe import Recipe

RECIPE_DIR = "/recipe"
RECIPE_FILE = "recipe.yaml"


def render_recipe(recipe: Recipe, settings: ClusterSettings, run: str | None = None) -> list[Manifest]:
    """ServiceAccount, ConfigMap, NetworkPolicy and RayJob, in the order to apply them.

    Args:
        recipe: what to train.
        settings: where, and as whom.
        run: the run's name; without it the recipe's own, else one made from the recipe's content.

    Raises:
        BadInput: a store or dataset on the local disk, an impossible resource, an impossible name, a queue or
            a clean-up that the recipe's workers don't allow.
    """
    name = run_name(recipe, run)
    owner = training_owner(name, settings)
    around, spec = job_parts(recipe, owner, settings, named=name)
    return [*around, ray_job(recipe, owner, settings, spec)]


def training_owner(name: str, settings: ClusterSettings) -> Owner:
    """Whose pods they are."""
    return Owner(name, "training", settings.training_account.name)


def job_parts(
    recipe: Recipe, owner: Owner, settings: ClusterSettings, *, named: str | None
) -> tuple[list[Manifest], Manifest]:
    """What stands around a job, and the spec of the RayJob.

    Args:
        named: the run's name; None names each run after its RayJob.

    Raises:
        BadInput: as `render_recipe`.
    """
    check_reachable({"store": recipe.store, "data.train": recipe.data.train, "data.eval": recipe.data.eval})
    config = _config_map(recipe, owner, settings)
    around = [
        *service_account(settings.training_account, settings),
        config,
        network_policy(owner, settings),
    ]
    return around, _job_spec(recipe, owner, settings, config["metadata"]["name"], named)


def ray_job(recipe: Recipe, owner: Owner, settings: ClusterSettings, spec: Manifest) -> Manifest:
    """The RayJob itself, with the labels of its queue."""
    about = {"tandem/model": recipe.model, "tandem/store": recipe.store}
    described = metadata(owner.name, owner, settings, **about)
    described["labels"] |= queue_labels(settings.job, recipe)
    return {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": described, "spec": spec}


def _job_spec(
    recipe: Recipe, owner: Owner, settings: ClusterSettings, config: str, named: str | None
) -> Manifest:
    workers = recipe.workers
    groups = worker_groups([Demand(workers.cpus, workers.gpus, workers.min, workers.max)], "workers")
    cluster = cluster_spec(owner, settings, groups)
    _mount_recipe(cluster["headGroupSpec"]["template"]["spec"], config)
    job = settings.job
    spec: Manifest = {
        "entrypoint": _entrypoint(job, named),
        "submissionMode": "K8sJobMode",
        "submitterPodTemplate": submitter_template(owner, settings),
        "backoffLimit": job.retries,
        **cleanup_fields(job, autoscales=cluster["enableInTreeAutoscaling"]),
        "rayClusterSpec": cluster,
    }
    if job.deadline_s is not None:
        spec["activeDeadlineSeconds"] = job.deadline_s
    if job.start_deadline_s is not None:
        spec["preRunningDeadlineSeconds"] = job.start_deadline_s
    return spec


def _entrypoint(job: Job, named: str | None) -> str:
    command = f"tandem train {RECIPE_DIR}/{RECIPE_FILE} --json"
    if named is not None:
        command += f" --run {named}"
    if job.cleanup is None:
        return f"{command} --as-job"
    # A stopped job would keep its cluster for ever: no deletion rule knows it.
    return command if named is not None else f"{command} --run-of-job"


def _config_map(recipe: Recipe, owner: Owner, settings: ClusterSettings) -> Manifest:
    data = as_written(recipe)
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata(f"{owner.name}-recipe-{content_hash(data)}", owner, settings),
        "immutable": True,
        "data": {RECIPE_FILE: to_yaml(data)},
    }


def _mount_recipe(pod: Manifest, config: str) -> None:
    """On the head alone: the driver runs there, and hands the workers what they need."""
    pod["volumes"].append({"name": "recipe", "configMap": {"name": config}})
    mount = {"name": "recipe", "mountPath": RECIPE_DIR, "readOnly": True}
    pod["containers"][0]["volumeMounts"].append(mount)
