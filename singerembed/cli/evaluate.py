"""The command `evaluate`."""

from __future__ import annotations

import json
from typing import Any

import click

from singerembed.cli.console import NumberRange, count_or_all, note, progress_bar, verbosity_options
from singerembed.errors import UsageError


@click.command()
@click.argument("data")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="MODEL",
    help="An engine file, a checkpoint, a baseline, or a transformers model; may be repeated.",
)
@click.option("-o", "--output", metavar="FOLDER", help="Write tables, the page and figures there.")
@click.option("--singer-column", metavar="NAME", help="The catalogue's column of singers.  [default: singer]")
@click.option("--path-column", default="path", show_default=True, help="The catalogue's column of paths.")
@click.option("--audio-root", metavar="FOLDER", help="What paths in a Parquet file count from.  [default: its folder]")
@click.option("--pairs", metavar="FILE", help="Pairs as lines label,path1,path2, label 1 for one singer.")
@click.option("--draw-pairs", type=click.IntRange(min=2), default=20_000, show_default=True, help="Otherwise draw N.")
@click.option("--all-pairs", is_flag=True, help="Take all pairs of crops for the equal error rate.")
@click.option(
    "--condition",
    "conditions",
    multiple=True,
    metavar="COLUMN",
    help="Also rate pairs that share this column's value, and those that do not; may be repeated.",
)
@click.option(
    "--within", multiple=True, metavar="COLUMN", help="Also rate pairs of one group, as of one sex; may be repeated."
)
@click.option(
    "--crops", default="all", metavar="all|N", callback=count_or_all, show_default=True, help="Crops of a recording."
)
@click.option(
    "--silence-dbfs",
    type=NumberRange(max=0),
    default=-60.0,
    show_default=True,
    help="Crops whose peak is not above this are left out.",
)
@click.option(
    "--scoring",
    type=click.Choice(["cosine", "centred", "whitened"]),
    default="cosine",
    show_default=True,
    help="What is done to embeddings before they are compared; fitted on the compared crops.",
)
@click.option("--no-identification", is_flag=True, help="Leave the linear probe out, which takes longest on much data.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that a transformers model brings with it.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="Threads of an engine.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of all that is drawn.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON on stdout.")
@verbosity_options
def evaluate(data: str, models: tuple[str, ...], output: str | None, *, as_json: bool, **values: Any) -> None:
    """Compare models on the labelled recordings DATA.

    DATA is a folder with a sub-folder for each singer, a catalogue with a singer column, or a Parquet file written by
    run, whose embeddings are then compared too. A MODEL is an engine file, a checkpoint, an official method, a folder
    or hub name of a transformers model (OWNER/NAME, OWNER/NAME@LAYER), or one of: shipped, untrained, mfcc, ge2e,
    campplus, fast-resnet34, h-asp, wav2vec2-base, xlsr-53; the last four also as NAME=WEIGHTS. Needs the extra eval.

    \b
    singerembed evaluate singers/ --model byol.engine --model ge2e --model mfcc -o report/
    """
    from functools import partial

    from singerembed.evaluation.baselines.load import ModelOptions, load_model
    from singerembed.evaluation.data import read_labelled
    from singerembed.evaluation.result import EvaluationOptions
    from singerembed.evaluation.run import evaluate as compare
    from singerembed.evaluation.table import as_text
    from singerembed.evaluation.write import check_folder, write_folder

    if values["pairs"] and values["all_pairs"]:
        raise UsageError("--pairs names the pairs, and --all-pairs takes all: give one of them")
    if output is not None:
        check_folder(output)
    options = EvaluationOptions(
        crops=values["crops"],
        pairs_file=values["pairs"],
        n_pairs=values["draw_pairs"],
        every_pair=values["all_pairs"],
        conditions=values["conditions"],
        within=values["within"],
        silence_dbfs=values["silence_dbfs"],
        identify=not values["no_identification"],
        scoring=values["scoring"],
        seed=values["seed"],
    )
    labelled = read_labelled(data, values["singer_column"], values["path_column"], values["audio_root"])
    how = ModelOptions(workers=values["workers"], trust_remote_code=values["trust_remote_code"])
    with progress_bar(len(labelled.recordings) * len(models), "recordings") as advance:
        loaders = [partial(load_model, model, how) for model in models]
        found = compare(labelled, loaders, options, say=note, advance=advance)
    if output is not None:
        write_folder(found, output)
        note("wrote", f"{output}: table.md, table.csv, evaluation.json, pairs.txt, index.html, figures/")
    click.echo(json.dumps(found.to_dict(), allow_nan=False) if as_json else as_text(found))
