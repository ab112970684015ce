"""`tandem data import`: CSV files and folders of images to datasets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from cluster import output
from cluster.commands.options import JsonOption

if TYPE_CHECKING:
    from training.data.importing import ImportReport

EvalOption = Annotated[float, typer.Option(help="Share of the rows held out for evaluation.")]
SeedOption = Annotated[int, typer.Option(help="Decides which rows are held out.")]
DestinationArgument = Annotated[str, typer.Argument(help="A folder or URI; gets train/ and eval/.")]

data_app = typer.Typer(help="Datasets.", no_args_is_help=True)
import_app = typer.Typer(help="Make a dataset of Parquet files.", no_args_is_help=True)
data_app.add_typer(import_app, name="import")


@import_app.command("csv")
def from_csv(
    source: str,
    destination: DestinationArgument,
    label: Annotated[str, typer.Option(help="The column to predict.")],
    eval_fraction: EvalOption = 0.2,
    seed: SeedOption = 0,
    drop: Annotated[list[str] | None, typer.Option(help="A column to leave out; repeatable.")] = None,
    category: Annotated[
        list[str] | None, typer.Option(help="A column of categories that look like numbers; repeatable.")
    ] = None,
    delimiter: str = ",",
    json_output: JsonOption = False,
) -> None:
    """Import a CSV file whose first line names the columns."""
    from training.data.importing import import_csv

    _print(
        import_csv(
            source,
            destination,
            label=label,
            eval_fraction=eval_fraction,
            seed=seed,
            drop=drop or [],
            categories=category or [],
            delimiter=delimiter,
        ),
        json_output,
    )


@import_app.command("images")
def from_images(
    folder: Path,
    destination: DestinationArgument,
    eval_fraction: EvalOption = 0.2,
    seed: SeedOption = 0,
    json_output: JsonOption = False,
) -> None:
    """Import FOLDER/CLASS/*.png or *.jpg."""
    from training.data.importing import import_images

    _print(import_images(folder, destination, eval_fraction=eval_fraction, seed=seed), json_output)


@data_app.command()
def sample(
    name: Annotated[
        Literal["digits", "breast-cancer", "diabetes", "diamonds"],
        typer.Argument(help="digits, breast-cancer, diabetes or diamonds"),
    ],
    destination: DestinationArgument,
    json_output: JsonOption = False,
) -> None:
    """Write a small real dataset that comes with scikit-learn: images, or a table; diamonds with plotnine."""
    from training.data import samples

    write = {
        "digits": samples.write_digits,
        "breast-cancer": samples.write_breast_cancer,
        "diabetes": samples.write_diabetes,
        "diamonds": samples.write_diamonds,
    }[name]
    train, evaluation = write(destination)
    facts = {"train": train, "eval": evaluation}
    output.emit(facts) if json_output else output.show_facts(facts)


def _print(report: ImportReport, json_output: bool) -> None:
    if json_output:
        output.emit(report)
        return
    facts = report.model_dump()
    facts["columns"] = ", ".join(f"{name} ({kind})" for name, kind in report.columns.items())
    facts["classes"] = ", ".join(report.classes) or None
    del facts["types"]
    output.show_facts({name.replace("_", " "): value for name, value in facts.items()})
