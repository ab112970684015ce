"""Names and labels of what is rendered, within the limits that the operator enforces.

KubeRay refuses a RayJob or RayService whose name is longer than 47 characters or isn't a DNS-1035
label, and neither the CRDs nor the API server say so earlier. A name that a person chose is refused
rather than mended, because it is what they will type afterwards; a name of our own making is built
to fit.

A run's name must be the same in every attempt: each retry of a RayJob builds a new cluster, and it
finds the checkpoints of the attempt before through the run's name alone. So it is derived from the
recipe's content, never from time or chance.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

from cluster.config import Frozen
from cluster.errors import BadInput, shown
from training.recipe import Recipe

MAX_NAME_CHARS = 47
MAX_SCHEDULE_CHARS = 36
"""Shorter: each time's RayJob has the schedule's name and a suffix."""
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_HASH_CHARS = 8

NAME_LABEL = "tandem/name"
COMPONENT_LABEL = "tandem/component"
ROLE_LABEL = "tandem/role"


def check_object_name(name: str, what: str, fix: str, max_chars: int = MAX_NAME_CHARS) -> str:
    """`name` itself, if a RayJob or RayService may have it.

    Raises:
        BadInput: it is too long, or not a DNS-1035 label.
    """
    if len(name) <= max_chars and _DNS_1035.fullmatch(name):
        return name
    problem = f" ({len(name)} characters)" if len(name) > max_chars else ""
    raise BadInput(
        f"the {what} can't name an object on Kubernetes",
        got=shown(name) + problem,
        allowed=f"at most {max_chars} of a-z, 0-9 and '-', a letter first, no '-' last",
        fix=fix,
    )


def as_written(settings: Frozen) -> dict[str, Any]:
    """What differs from the defaults, as plain data.

    Loading it gives an equal object, and a later release that adds a setting with a default leaves
    it, and whatever is hashed from it, as it was.
    """
    return settings.model_dump(mode="json", exclude_defaults=True)


def content_hash(data: Any) -> str:
    """Eight hexadecimal digits that depend on plain data, and on nothing else."""
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":")).encode()
    return hashlib.sha256(canonical).hexdigest()[:_HASH_CHARS]


def run_name(recipe: Recipe, run: str | None = None) -> str:
    """The run's name, and its RayJob's: `run`, else the recipe's own, else one made from its content.

    Raises:
        BadInput: a name that was chosen can't name an object on Kubernetes.
    """
    if chosen := run or recipe.run:
        return check_object_name(
            chosen, "run's name", "choose another with --run, or leave it out to have one made"
        )
    return f"{_slug(recipe.model, MAX_NAME_CHARS - _HASH_CHARS - 1)}-{content_hash(as_written(recipe))}"


def schedule_name(recipe: Recipe, run: str | None = None) -> str:
    """What a repeated recipe's objects are called, and its runs' names begin with.

    `run`, else the recipe's own run, else its model. Without a hash, unlike a run's: a recipe that changes
    goes on under the same name.

    Raises:
        BadInput: a name that was chosen can't name an object on Kubernetes.
    """
    if chosen := run or recipe.run:
        fix = "choose another with --run, or leave it out to have one made"
        return check_object_name(chosen, "schedule's name", fix, MAX_SCHEDULE_CHARS)
    return _slug(recipe.model, MAX_SCHEDULE_CHARS)


def _slug(model: str, max_chars: int) -> str:
    slug = re.sub(r"[._-]+", "-", model)
    slug = slug if slug[0].isalpha() else f"m-{slug}"
    return slug[:max_chars].rstrip("-")


def service_name(name: str) -> str:
    """The RayService's name.

    Raises:
        BadInput: the service's name can't name an object on Kubernetes.
    """
    return check_object_name(name, "service's name", "change 'name' in the service file")


def pod_labels(name: str, component: str, role: str) -> dict[str, str]:
    """Labels of our own for pods.

    The operator's labels name the generated RayCluster, which changes with every upgrade. Policies
    and budgets need labels that stay; adding them to a running service later would mean a new cluster.
    """
    return {NAME_LABEL: name, COMPONENT_LABEL: component, ROLE_LABEL: role}


def object_labels(name: str, component: str) -> dict[str, str]:
    """The labels that Kubernetes recommends, for the objects themselves."""
    return {
        "app.kubernetes.io/name": "tandem",
        "app.kubernetes.io/instance": name,
        "app.kubernetes.io/component": component,
        "app.kubernetes.io/managed-by": "tandem",
    }
