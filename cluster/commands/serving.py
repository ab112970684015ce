"""`tandem serve`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.foreground import ends_with_its_ray
from cluster.commands.options import DEFAULT_STORE, AddressOption, JsonOption, OverridesArgument, StoreOption

if TYPE_CHECKING:
    from serving.service import Service


def serve(
    what: Annotated[str, typer.Argument(metavar="SERVICE.yaml|MODEL@ALIAS", show_default=False)],
    overrides: OverridesArgument = None,
    store: StoreOption = DEFAULT_STORE,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    grpc_port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, help="Answer gRPC there too; 0 picks a free port.", show_default="no gRPC"
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    address: AddressOption = None,
    haproxy: Annotated[bool, typer.Option(help="HAProxy as the ingress, or Ray Serve's own proxy.")] = True,
    json_output: JsonOption = False,
) -> None:
    """Serve models over HTTP, and gRPC if asked, until SIGTERM or Ctrl-C, then drain."""
    from serving.run import run_service

    service = _service(what, overrides or [], store)
    with ends_with_its_ray():
        code = run_service(
            service,
            address=address,
            host=host,
            port=port,
            grpc_port=grpc_port,
            haproxy=haproxy,
            json_output=json_output,
        )
    raise typer.Exit(code)


def _service(what: str, overrides: list[str], store: str) -> Service:
    from cluster.config import load_yaml, parse_yaml
    from serving.service import Service

    if what.endswith((".yaml", ".yml")) or Path(what).is_file():
        return load_yaml(Service, Path(what), overrides)
    from cluster.names import ModelRef

    text = f"store: {_quoted(store)}\nmodels: [{{model: {_quoted(str(ModelRef.parse(what)))}}}]\n"
    return parse_yaml(Service, text, "the command line", overrides)


def _quoted(text: str) -> str:
    import json

    return json.dumps(text)
