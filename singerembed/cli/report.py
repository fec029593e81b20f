"""The command `report`."""

from __future__ import annotations

import os

import click

from singerembed.cli.console import note, verbosity_options
from singerembed.errors import InputError


@click.command()
@click.argument("parquet")
@click.option("-o", "--output", required=True, metavar="FILE", help="The page, FILE.html; figures go beside it.")
@click.option(
    "--singer-column",
    metavar="NAME",
    help="The column of singers; track_id takes each recording for itself.  [default: singer]",
)
@click.option("--condition", "conditions", multiple=True, metavar="COLUMN", help="As in evaluate; may be repeated.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all that is drawn.")
@verbosity_options
def report(parquet: str, output: str, singer_column: str | None, conditions: tuple[str, ...], seed: int) -> None:
    """Draw what is in PARQUET, a file written by run, as one page that opens offline.

    Average similarity between singers, a map of crops in three dimensions, cohesion and confusions of each singer,
    error rates, and where the file comes from; each figure as PNG and SVG too. Needs the extra eval.

    \b
    singerembed report out.parquet -o report.html
    """
    from singerembed.evaluation.data import is_output, read_labelled
    from singerembed.evaluation.result import EvaluationOptions
    from singerembed.evaluation.run import evaluate as examine
    from singerembed.evaluation.write import check_page_path, write_page

    check_page_path(output)
    if not os.path.exists(parquet) or not is_output(parquet):  # noqa: PTH110
        raise InputError(f"{parquet} is not a Parquet file written by singerembed run")
    options = EvaluationOptions(conditions=conditions, seed=seed)
    found = examine(read_labelled(parquet, singer_column), [], options, say=note)
    note("wrote", f"{output}, {write_page(found, output)}/")
