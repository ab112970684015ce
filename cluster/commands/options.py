"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cluster.storage import Store

DEFAULT_STORE = "tandem-store"

StoreOption = Annotated[
    str,
    typer.Option(
        "--store", envvar="TANDEM_STORE", help="Where runs and models are: a folder, s3://, gs://, az://."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address", envvar="RAY_ADDRESS", help="HOST:PORT of a Ray cluster; without it, a local Ray."
    ),
]
RunOption = Annotated[str | None, typer.Option("--run", help="The run's name; an existing run is continued.")]
YamlArgument = Annotated[Path, typer.Argument(metavar="FILE.yaml", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Values laid over the file's: workers.max=4"),
]


def existing_store(uri: str) -> Store:
    """The store at `uri`, for commands that only look: a folder that isn't there isn't made.

    Raises:
        NotFound: there is no such folder.
    """
    from cluster.errors import NotFound, shown
    from cluster.storage import Deadlines, Location, open_store

    where = Location.parse(uri)
    if where.scheme == "file" and not Path("/" + where.prefix).is_dir():
        raise NotFound(
            "there is no store",
            got=shown(uri),
            allowed="a folder that a recipe's 'store' names, s3://…, gs://…, az://…",
            fix="say where it is: --store URI, or TANDEM_STORE in the environment",
        )
    return open_store(uri, Deadlines(request_s=10, retry_s=10))  # a person waits
