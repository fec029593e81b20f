"""The command `index`."""

from __future__ import annotations

import json
from dataclasses import asdict

import click

from singerembed.cli.console import note, progress_bar, verbosity_options
from singerembed.errors import UsageError
from singerembed.storage import printable


@click.command()
@click.argument("outputs", nargs=-1, required=True)
@click.argument("index")
@click.option("--singer-column", metavar="NAME", help="The column of singers.  [default: singer, if there is one]")
@click.option(
    "--scoring",
    type=click.Choice(["centred", "cosine", "whitened"]),
    help="What is done to embeddings before they are compared.  [default: centred]",
)
@click.option("--update", is_flag=True, help="Take tracks out of INDEX that OUTPUTS, all of them named, do not have.")
@click.option("--allow-gone", is_flag=True, help="With --update: take out even more than half of INDEX.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON on stdout.")
@verbosity_options
def index(
    outputs: tuple[str, ...],
    index: str,
    singer_column: str | None,
    scoring: str | None,
    update: bool,
    allow_gone: bool,
    as_json: bool,
) -> None:
    """Make an INDEX for search of OUTPUTS, Parquet files or folders written by run.

    Crops without an embedding are left out. A recording that is there twice counts once, also in two formats if it has
    six crops or more. If INDEX exists, tracks that it does not have are added, and those whose recording or singer has
    changed are replaced; with --update those that OUTPUTS do not have are taken out. The column of singers and the
    scoring are fixed when the index is made. Needs the extra search.

    \b
    singerembed index library.parquet library.index
    singerembed index tonight.parquet library.index
    singerembed index library.parquet library.index --update
    """
    from singerembed.search.build import build_index

    if allow_gone and not update:
        raise UsageError("--allow-gone belongs to --update")
    with progress_bar(None, "tracks") as advance:
        done = build_index(
            list(outputs),
            index,
            singer_column=singer_column,
            scoring=scoring,
            update=update,
            allow_gone=allow_gone,
            advance=lambda: advance(""),
        )
    if as_json:
        click.echo(json.dumps(asdict(done)))
    left_out = f"{done.silent:,} silent crops and {done.error_tracks:,} tracks with errors left out"
    changes = f"{done.known:,} tracks were there, {done.replaced:,} replaced"
    changes += f", {done.gone:,} gone" if update else ""
    note("added", f"{done.added_tracks:,} tracks, {done.added_crops:,} crops ({left_out}; {changes})")
    if done.singer_column is None:
        note(
            "singers", "none, as no column is named: search names tracks only. Make it again with --singer-column NAME"
        )
    if done.n_doubled:
        examples = "; ".join(f"{printable(path)} is {printable(first)}" for path, first in done.doubled)
        note("twice", f"{done.n_doubled:,} tracks are copies of others and count once: {examples}")
    note("index", f"{done.index}: {done.n_tracks:,} tracks, {done.n_crops:,} crops")
