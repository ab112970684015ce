"""`tandem k8s`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cluster import output
from cluster.commands.options import JsonOption, RunOption, YamlArgument

k8s_app = typer.Typer(help="Kubernetes, through KubeRay.", no_args_is_help=True)


@k8s_app.callback()
def k8s() -> None:
    """Kubernetes, through KubeRay."""


@k8s_app.command()
def render(
    file: YamlArgument,
    out: Annotated[Path | None, typer.Option(help="A folder to write to; without it, stdout.")] = None,
    settings: Annotated[
        Path | None, typer.Option(help="What the cluster is like: image, Secrets, sizes.")
    ] = None,
    overlay: Annotated[
        str | None, typer.Option(help="One of k8s/overlays, or a folder like it, built by kubectl kustomize.")
    ] = None,
    run: RunOption = None,
    json_output: JsonOption = False,
) -> None:
    """Turn a recipe into a RayJob, or a service into a RayService."""
    from k8s.overlay import render_overlay
    from k8s.render import render_files

    if overlay is None:
        rendered = render_files(file, out=out, settings=settings, run=run)
    else:
        rendered = render_overlay(file, overlay, out=out, settings=settings, run=run)
    if isinstance(rendered, str):
        output.emit({"text": rendered}) if json_output else output.tell(rendered.rstrip("\n"))
    elif json_output:
        output.emit({"files": [str(path) for path in rendered]})
    else:
        for path in rendered:
            output.tell(str(path))


@k8s_app.command()
def lint(
    path: Annotated[Path, typer.Argument(help="Manifests: a file, or a folder of some.")],
    crds: Annotated[Path | None, typer.Option(help="A folder with KubeRay's CRDs, to check against.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Tell what a cluster would refuse or never act upon; exits 2 where there is anything."""
    from k8s.lint.layers import lint as linted
    from k8s.planned import read_manifests
    from k8s.validate import Crds

    found = linted(read_manifests(path), Crds.load(crds) if crds else None)
    if json_output:
        findings = [finding._asdict() for finding in found.findings]
        output.emit({"findings": findings, "unchecked": list(found.unchecked)})
    else:
        for finding in found.findings:
            output.tell(str(finding))
        for rule in found.unchecked:
            output.tell(f"not checked: {rule}")
        if not found.findings:
            output.tell("nothing found")
    if found.findings:
        raise typer.Exit(2)


@k8s_app.command()
def plan(
    old: Annotated[Path, typer.Argument(help="Manifests as they were applied last: a file or a folder.")],
    new: Annotated[Path, typer.Argument(help="Manifests that are to be applied.")],
    json_output: JsonOption = False,
) -> None:
    """Tell what applying manifests will do: in place, a new cluster, or nothing until there is one."""
    from k8s.plan import plan as planned
    from k8s.planned import as_json, as_text, read_manifests

    found = planned(read_manifests(old), read_manifests(new))
    if json_output:
        output.emit(as_json(found))
        return
    for line in as_text(found):
        output.tell(line)


@k8s_app.command()
def diff(
    old: Annotated[Path, typer.Argument(help="Manifests as they were applied last: a file or a folder.")],
    new: Annotated[Path, typer.Argument(help="Manifests that are to be applied.")],
    json_output: JsonOption = False,
) -> None:
    """Show a promotion for review: what each object's change will do, then the change itself."""
    from k8s.diff import as_json, as_text
    from k8s.diff import diff as compared
    from k8s.planned import read_manifests

    found = compared(read_manifests(old), read_manifests(new))
    if json_output:
        output.emit(as_json(found))
        return
    for line in as_text(found):
        output.tell(line)
