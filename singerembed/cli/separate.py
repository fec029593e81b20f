"""The command `separate`."""

from __future__ import annotations

import json
import time
from typing import Any

import click

from singerembed.cli.catalog_options import catalog_options, columns_of
from singerembed.cli.console import note, progress_bar, verbosity_options
from singerembed.cli.process import quiet_libraries, stop_signals

EXIT_WITH_ERRORS = 3


@click.command()
@click.argument("catalog")
@click.argument("folder")
@click.option(
    "--separator", required=True, metavar="FILE", help="Separator, as made by: singerembed build-engine spleeter."
)
@catalog_options
@click.option("--workers", type=click.IntRange(min=1), help="Threads that decode and separate.  [default: the cores]")
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON on stdout.")
@verbosity_options
def separate(catalog: str, folder: str, *, separator: str, workers: int | None, as_json: bool, **columns: Any) -> None:
    """Write the voice of every recording of CATALOG to FOLDER, as FLAC, and a catalogue that names them.

    For those who want to keep and hear the voices: `run --separate` needs no stems. FOLDER/catalog.csv has the columns
    of CATALOG, where each stem is (vocals), and what went wrong (separate_error). A command that was stopped goes on
    when it is given again; given later, it separates what is new and what has another size or time since.

    Exit codes: 0 all well, 3 some recordings could not be separated, 1 could not run, 2 usage, 130 or 143 interrupted.

    \b
    singerembed separate library.csv stems --separator spleeter.engine
    singerembed run stems/catalog.csv out.parquet --vocals-column vocals
    """
    from singerembed.catalog.read import Track
    from singerembed.errors import TrackError
    from singerembed.jobs.stems import CATALOG_NAME, separate_catalog
    from singerembed.storage import printable, redacted

    first_error = ""
    started = time.monotonic()
    with quiet_libraries(), stop_signals() as stop, progress_bar(None, "recordings") as advance:

        def separated(track: Track, error: TrackError | None) -> None:
            nonlocal first_error
            path = printable(redacted(track.path))
            advance(path)
            if error is not None and not first_error:
                first_error = f"row {track.row:,} {path}: {error}"

        counts = separate_catalog(
            catalog,
            folder,
            separator,
            columns=columns_of(columns),
            workers=workers,
            separated=separated,
            say=note,
            stop=stop,
        )
    if as_json:
        click.echo(json.dumps({"catalog": f"{folder}/{CATALOG_NAME}", **counts.__dict__}))
    kept = f" ({counts.kept:,} were there)" if counts.kept else ""
    what = f"{counts.tracks:,} tracks, {counts.written:,} stems{kept}, {counts.errors:,} errors"
    note("wrote", f"{folder}/{CATALOG_NAME}: {what} in {time.monotonic() - started:.1f} s")
    if counts.errors:
        note("errors", f"first: {first_error}")
        click.get_current_context().exit(EXIT_WITH_ERRORS)
