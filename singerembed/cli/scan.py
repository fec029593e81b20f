"""The command `scan`."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

import click

from singerembed.cli.console import note, verbosity, verbosity_options
from singerembed.storage import redacted

if TYPE_CHECKING:
    from singerembed.catalog.scan import ScanCounts

EXIT_WITH_UNREADABLE = 3


@click.command()
@click.argument("folder", nargs=-1, required=True)
@click.argument("catalog")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Files that are read at a time; storage behind a network likes more.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the counts as JSON on stdout.")
@verbosity_options
def scan(folder: tuple[str, ...], catalog: str, *, workers: int, as_json: bool) -> None:
    """Write the recordings in each FOLDER to CATALOG, a .csv, .jsonl or .parquet file, with their tags.

    FOLDER may be a playlist (.m3u, .m3u8, .pls) or a cue sheet (.cue) too, or lie on object storage. A cue sheet in a
    folder cuts the long file beside it into tracks. Hidden files, recycle bins and partial downloads are left out.
    Paths are relative to the catalogue where they lie in its folder. The same folder twice gives the same file.

    Exit codes: 0 all well, 3 a folder could not be read, 1 could not run, 2 usage.

    \b
    singerembed scan ~/Music library.csv
    singerembed scan s3://music/albums/ s3://music/singles/ library.parquet
    """
    from singerembed.catalog.scan import scan as scan_folders
    from singerembed.output.finished import check_result_path

    check_result_path(catalog)

    started = time.monotonic()
    quiet = verbosity(click.get_current_context()) < 0
    with ScanBar(quiet=quiet) as bar:
        counts = scan_folders(folder, catalog, workers=workers, say=bar.say, found=bar.update)
    if as_json:
        click.echo(json.dumps({"catalog": catalog, **counts.to_dict()}))
    note("wrote", f"{redacted(catalog)}: {counts} in {time.monotonic() - started:.1f} s")
    if counts.unreadable_folders:
        click.get_current_context().exit(EXIT_WITH_UNREADABLE)


class ScanBar:
    """Draws how far a scan is, on a terminal only, and prints notes above it."""

    def __init__(self, *, quiet: bool) -> None:
        from tqdm import tqdm

        show = not quiet and sys.stderr.isatty()
        form = "{n_fmt} recordings | {rate_fmt} | {elapsed}"
        self._bar = tqdm(unit="", bar_format=form, disable=not show, leave=False, dynamic_ncols=True, delay=0.5)

    def __enter__(self) -> ScanBar:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._bar.close()

    def update(self, counts: ScanCounts) -> None:
        """Show how many recordings there are by now."""
        self._bar.update(counts.recordings - self._bar.n)

    def note(self, what: str, text: str) -> None:
        """Print a note; the scan is over, or draws its line again below it."""
        self._bar.clear()
        note(what, text)

    def say(self, text: str) -> None:
        """Print what is wrong with a folder."""
        self.note("unreadable", text)
