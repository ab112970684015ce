"""`tandem runs pin` and `unpin`: checkpoints that a person wants to keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cluster import output
from cluster.commands.options import DEFAULT_STORE, JsonOption, StoreOption, existing_store

if TYPE_CHECKING:
    from cluster.pins import Pins

RunArgument = Annotated[str, typer.Argument(help="The run.", metavar="RUN")]
NumberArgument = Annotated[int, typer.Argument(help="The checkpoint's number.", metavar="NUMBER")]


def pin(
    run: RunArgument,
    number: NumberArgument,
    store: StoreOption = DEFAULT_STORE,
    json_output: JsonOption = False,
) -> None:
    """Keep a checkpoint for ever, whatever the recipe's checkpoint.keep says."""
    pins = _pins(run, store)
    pins.add(number)
    _show(run, pins.numbers(), json_output)


def unpin(
    run: RunArgument,
    number: NumberArgument,
    store: StoreOption = DEFAULT_STORE,
    json_output: JsonOption = False,
) -> None:
    """Leave a checkpoint to the recipe's checkpoint.keep again."""
    pins = _pins(run, store)
    pins.remove(number)
    _show(run, pins.numbers(), json_output)


def _pins(name: str, store: str) -> Pins:
    from cluster.pins import Pins
    from cluster.runs import Run

    run = Run(existing_store(store), name)
    run.record()  # says so where there is no such run
    return Pins(run)


def _show(run: str, pinned: set[int], json_output: bool) -> None:
    if json_output:
        output.emit({"run": run, "pinned": sorted(pinned)})
    else:
        output.show_facts({"run": run, "pinned": ", ".join(map(str, sorted(pinned))) or "none"})
