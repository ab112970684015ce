"""From a recipe or a service file to manifests: `tandem k8s render`.

Deterministic: the same file, settings and run name give the same bytes, so a rendered folder can be
kept in git and a change to it reviewed. Writes only files that it wrote before.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from cluster.config import load_yaml
from cluster.errors import BadInput, shown
from k8s.pods import Manifest
from k8s.rayjob import render_recipe
from k8s.rayschedule import render_schedule
from k8s.rayservice import render_service
from k8s.settings import ClusterSettings
from k8s.yamltext import to_yaml
from serving.service import Service
from training.recipe import Recipe

__all__ = ["render_files", "render_recipe", "render_service"]

HEADER = "# Rendered by `tandem k8s render`; edits are lost with the next rendering.\n"
_KUSTOMIZATION = "kustomization.yaml"


def render_files(path: Path, *, out: Path | None, settings: Path | None, run: str | None) -> list[Path] | str:
    """Render the recipe or service at `path`.

    Args:
        path: a recipe or a service; which of the two is seen from its keys.
        out: the folder to write to, made where it is missing; None renders to one text.
        settings: a file of `ClusterSettings`; None means the defaults.
        run: the run's name, for a recipe.

    Returns:
        The files written, or the text where `out` is None.

    Raises:
        BadInput: a file can't be read or breaks a rule, or `out` holds a file that isn't ours.
    """
    cluster = load_yaml(ClusterSettings, settings) if settings else ClusterSettings()
    manifests = render(path, cluster, run)
    needs = _needs(cluster)
    if out is None:
        return HEADER + needs + to_yaml(*manifests)
    return _write(out, manifests, needs, cluster.namespace)


def render(path: Path, settings: ClusterSettings, run: str | None = None) -> list[Manifest]:
    """The manifests of the recipe or service at `path`, in the order to apply them.

    Raises:
        BadInput: as `render_files`.
    """
    if _is_service(path):
        if run is not None:
            raise BadInput(
                "a service has no run", got=f"--run {shown(run)}", fix="leave --run out, or give a recipe"
            )
        return render_service(load_yaml(Service, path), settings)
    recipe = load_yaml(Recipe, path)
    if settings.schedule:
        return render_schedule(recipe, settings, settings.schedule, run)
    return render_recipe(recipe, settings, run)


def _is_service(path: Path) -> bool:
    """A service has `models`; all else is read as a recipe if it has one of a recipe's own keys."""
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return False  # reading it as a recipe says what is wrong with it
    keys = set(data) if isinstance(data, dict) else set()
    service, recipe = "models" in keys, bool(keys & {"task", "data", "model"})
    if service == recipe:
        raise BadInput(
            f"'{path}' is neither a recipe nor a service"
            if not service
            else f"'{path}' is two things at once",
            got="keys " + (", ".join(sorted(map(str, keys))) or "none"),
            allowed="a recipe (model, task, data, store, …) or a service (store, models, …)",
            fix="see k8s/examples for one of each",
        )
    return service


def _needs(settings: ClusterSettings) -> str:
    """What must stand in the namespace beforehand, as comments: Secrets are named here, never made."""
    secrets = [(settings.auth_secret, "key auth_token: Ray's token, for example of openssl rand -hex 32")]
    if settings.store_secret:
        secrets.append((settings.store_secret, "the store's credentials, as environment variables"))
    if settings.redis and settings.redis.password:
        secrets.append((settings.redis.password.name, f"key {settings.redis.password.key}: Redis' password"))
    lines = [f"# Needs Secret {name} ({what}).\n" for name, what in secrets]
    return f"# Needs namespace {settings.namespace}.\n" + "".join(lines)


def _write(out: Path, manifests: list[Manifest], needs: str, namespace: str) -> list[Path]:
    texts: dict[str, str] = {}
    for manifest in manifests:
        kind = str(manifest["kind"]).lower()
        again = sum(name.startswith((f"{kind}.", f"{kind}-")) for name in texts)
        texts[f"{kind}-{again + 1}.yaml" if again else f"{kind}.yaml"] = HEADER + to_yaml(manifest)
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": namespace,
        "resources": list(texts),
    }
    texts[_KUSTOMIZATION] = HEADER + needs + to_yaml(kustomization)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in texts:
            check_ours(out / name)
        for name, text in texts.items():
            (out / name).write_text(text, "utf-8")
    except OSError as error:
        raise BadInput(
            f"'{out}' can't be written to", got=shown(str(error)), allowed="a folder of one's own"
        ) from None
    return [out / name for name in texts]


def check_ours(path: Path) -> None:
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as handle:
        if handle.readline() == HEADER:
            return
    raise BadInput(
        f"'{path}' was not written by this command, and stays as it is",
        got="a file without our first line",
        allowed="a folder that is empty, or that was rendered before",
        fix="choose another --out, and refer to it from your own kustomization",
    )
