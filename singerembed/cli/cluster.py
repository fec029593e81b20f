"""The command `cluster`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from singerembed.cli.console import aligned, note, progress_bar, verbosity_options
from singerembed.storage import printable

if TYPE_CHECKING:
    from singerembed.search.cluster import Groups


@click.command()
@click.argument("source")
@click.option("-o", "--output", metavar="FILE", help="Write a row a track to this Parquet file.")
@click.option(
    "--min-tracks", type=click.IntRange(min=2), default=2, show_default=True, help="The least tracks of a group."
)
@click.option("--top", type=click.IntRange(min=0), default=20, show_default=True, help="Groups to print.")
@click.option("--json", "as_json", is_flag=True, help="Print the groups as JSON on stdout.")
@verbosity_options
def cluster(source: str, output: str | None, min_tracks: int, top: int, as_json: bool) -> None:
    """Group the tracks of SOURCE, an output of run or an index, that sound like one singer.

    A group's stability, 0 to 1, says how much of it comes back when a fifth of the tracks is left out. Tracks that are
    like no others are in no group. Needs the extra search.

    \b
    singerembed cluster unlabelled.parquet -o groups.parquet
    """
    from singerembed.output.finished import check_result_path
    from singerembed.search.build import index_of
    from singerembed.search.cluster import group_tracks, write_groups

    if output is not None:
        check_result_path(output, ".parquet")
    with progress_bar(None, "tracks") as advance, index_of(source, None, lambda: advance("")) as index:
        groups = group_tracks(index, min_tracks)
        _print_groups(groups, index.tracks["path"].to_pylist(), top, as_json=as_json)
        if output is not None:
            write_groups(index, groups, output)
            note("wrote", output)


def _print_groups(groups: Groups, paths: list[str], top: int, *, as_json: bool) -> None:
    members = [groups.track[groups.group == number].tolist() for number in range(groups.n_groups)]
    if as_json:
        facts = [
            {"group": number, "stability": float(groups.stability[number]), "paths": [paths[track] for track in tracks]}
            for number, tracks in enumerate(members)
        ]
        click.echo(json.dumps(facts))
    else:
        rows = [
            [str(number), str(len(tracks)), f"{groups.stability[number]:.2f}", printable(paths[tracks[0]])]
            for number, tracks in enumerate(members[:top])
        ]
        click.echo(aligned(["group", "tracks", "stability", "first track"], rows))
    alone = int((groups.group < 0).sum())
    note("groups", f"{groups.n_groups:,} groups of {len(groups.track) - alone:,} tracks; {alone:,} tracks in none")
