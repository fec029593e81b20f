"""The command `verify`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from singerembed import storage
from singerembed.cli.console import NumberRange, aligned, note, percent, progress_bar, verbosity_options
from singerembed.storage import printable

if TYPE_CHECKING:
    from singerembed.search.verify import Verification

_LOOKED_FOR = 20  # recordings, to see whether the page can play them
_NAMED = 10  # singers with too few tracks that are named on the terminal


@click.command()
@click.argument("source")
@click.option("--singer-column", metavar="NAME", help="The column of credits.  [default: the index's, or singer]")
@click.option(
    "-o", "--output", metavar="FILE", help="Write FILE.parquet, and, if FILE ends in .html, a page to listen."
)
@click.option("--audio-root", metavar="FOLDER", help="What paths count from.  [default: the output's folder]")
@click.option(
    "--max-chance",
    type=NumberRange(min=0, max=1),
    default=0.05,
    show_default=True,
    help="Credits with at most this chance, at even odds, are suspects.",
)
@click.option("--top", type=click.IntRange(min=0), default=20, show_default=True, help="Suspects to print.")
@click.option("--json", "as_json", is_flag=True, help="Print suspects and calibration as JSON on stdout.")
@verbosity_options
def verify(
    source: str,
    singer_column: str | None,
    output: str | None,
    audio_root: str | None,
    max_chance: float,
    top: int,
    as_json: bool,
) -> None:
    """Find tracks that are not sung by the singer they are credited to.

    Each track of SOURCE, an output of run or an index, is compared with the others of its credited singer and with
    all other singers. The chance comes from a calibration on the library itself, whose error on singers left out is
    printed. Singers with fewer than three tracks are named, not guessed. Needs the extra search.

    \b
    singerembed verify library.parquet --singer-column artist -o audit.html
    """
    from singerembed.output.finished import check_result_path
    from singerembed.search.audit_page import write_audit
    from singerembed.search.build import index_of
    from singerembed.search.verify import check_table_path, verify_credits, write_credits

    table = None
    if output is not None:
        check_result_path(output, ".html", ".parquet")
        table = output.removesuffix(".html").removesuffix(".parquet") + ".parquet"
        check_result_path(table)
        check_table_path(table)
    with progress_bar(None, "tracks") as advance, index_of(source, singer_column, lambda: advance("")) as index:
        found = verify_credits(index, singer_column)
        _print_found(found, max_chance, top, as_json=as_json)  # before files are written, which may fail
        if output is not None and table is not None:
            write_credits(found, table, max_chance)
            if output.endswith(".html"):
                root = storage.resolve(source, "") if audio_root is None else os.path.join(audio_root, "")  # noqa: PTH118
                write_audit(found, index, output, root, max_chance, 1 - max_chance)
                places = [storage.resolve(root, path) for path in found.credits.path[:_LOOKED_FOR]]
                if not any(storage.is_remote(place) or Path(place).exists() for place in places):
                    note(
                        "warning",
                        f"the page cannot play the recordings: {places[0]} is not there. Name the folder that paths "
                        "count from with --audio-root",
                    )
            note("wrote", f"{output}, {table}" if output.endswith(".html") else output)


def _print_found(found: Verification, max_chance: float, top: int, *, as_json: bool) -> None:
    """Print suspects on stdout, and what they are compared by on stderr."""
    credits, fit = found.credits, found.calibration
    suspects, divided = found.suspects(max_chance), found.divided(1 - max_chance)
    nearest = [
        found.singers[credits.other[row]] if credits.other_llr[row] > 0 else "(nobody in the library)"
        for row in suspects
    ]
    if as_json:
        facts = [
            {
                "track_id": credits.track_id[row], "path": credits.path[row],
                "credited": found.singers[credits.singer[row]], "chance": float(credits.chance[row]),
                "llr": float(credits.llr[row]), "nearest": name,
            }
            for row, name in zip(suspects.tolist(), nearest, strict=True)
        ]  # fmt: skip
        several = [credits.path[row] for row in divided.tolist()]
        result = {"suspects": facts, "more_than_one_voice": several, "too_few_tracks": found.too_few}
        click.echo(json.dumps({**result, "calibration": fit.to_dict()}))
    else:
        rows = [
            [
                percent(float(credits.chance[row])),
                printable(credits.path[row]),
                found.singers[credits.singer[row]],
                name,
            ]
            for row, name in zip(suspects[:top].tolist(), nearest, strict=False)
        ]
        click.echo(aligned(["chance it is them", "track", "credited", "nearest other"], rows))
    checked = found.n_checked
    note(
        "suspects",
        f"{len(suspects):,} of {checked:,} credits that could be checked have {percent(max_chance)} chance or less",
    )
    note(
        "calibration",
        f"on {fit.n_singers:,} singers: equal error rate {100 * fit.eer:.1f} %, Cllr {fit.cllr:.2f} (at best "
        f"{fit.min_cllr:.2f}), calibration error {100 * fit.ece:.1f} %",
    )
    if len(divided):
        note(
            "voices",
            f"{len(divided):,} tracks may hold more than one voice, first: {printable(credits.path[divided[0]])}",
        )
    if found.too_few:
        more = ", ..." if len(found.too_few) > _NAMED else ""
        note(
            "too few",
            f"{len(found.too_few):,} singers have fewer than 3 tracks: {', '.join(found.too_few[:_NAMED])}{more}",
        )
