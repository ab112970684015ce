"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
