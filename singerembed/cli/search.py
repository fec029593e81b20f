"""The command `search`."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from singerembed.cli.console import NumberRange, aligned, note, percent, verbosity_options
from singerembed.errors import InputError, UsageError
from singerembed.storage import printable

if TYPE_CHECKING:
    from singerembed.search.query import Answer, Index

_COPIES = 3  # of a recording that are named on the terminal


@click.command()
@click.argument("index")
@click.argument("queries", nargs=-1)
@click.option(
    "--track",
    "tracks",
    multiple=True,
    metavar="ID",
    help="Look up a track of the index; may be repeated.",
)
@click.option("--catalog", metavar="OUTPUT", help="Screen every track of an output of run against the index's singers.")
@click.option("--engine", metavar="FILE", help="The engine that made the index.  [default: the bundled one]")
@click.option(
    "--separate",
    metavar="FILE",
    help="The separator that the index's voices came out of, where it was made with run --separate.",
)
@click.option("--top", type=click.IntRange(min=1), default=10, show_default=True, help="Tracks, and singers, to name.")
@click.option(
    "--by",
    type=click.Choice(["track", "crop"]),
    default="track",
    show_default=True,
    help="Rank tracks by the mean over their crops, or by the one crop that is most similar.",
)
@click.option("--where", metavar="SQL", help='Only tracks for which this holds, as "year < 1990".')
@click.option(
    "--min-chance",
    type=NumberRange(min=0, max=1),
    default=0.5,
    show_default=True,
    help="With --catalog: name tracks whose nearest singer has at least this chance.",
)
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV on stdout.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, a line a query or screened track.")
@verbosity_options
def search(index: str, queries: tuple[str, ...], as_csv: bool, as_json: bool, **values: Any) -> None:
    """Name the tracks and the singers of INDEX that sound most like each recording of QUERIES.

    "where" names crops that match: a time in the query, and the time in the track that is like it. A singer's chance
    supposes that the query is sung by one of the index's singers in one case of two. With --catalog, a line for each
    track of an output that sounds like a singer it is not credited to. Of several recordings, those that cannot be
    looked up are named, and the exit code is 3. Needs the extra search.

    \b
    singerembed search library.index demo.m4a --top 3
    singerembed search library.index --track 04711 --where "year < 1990"
    singerembed search library.index --catalog tonight.parquet --min-chance 0.9 --csv
    """
    if as_csv and as_json:
        raise UsageError("give --csv or --json, not both")
    if not queries and not values["tracks"] and values["catalog"] is None:
        raise UsageError("nothing to look up: give a recording, --track ID or --catalog OUTPUT")
    from singerembed.search.query import open_index

    opened = open_index(index, values["engine"], values["separate"])
    if values["catalog"] is not None:
        _screen(opened, values["catalog"], values["min_chance"], as_csv, as_json)
    how = {"top": values["top"], "by": values["by"], "where": values["where"]}
    asked = list[tuple[str, Callable[[], "Answer"]]]()
    asked += [(name, partial(opened.search_track, name, **how)) for name in values["tracks"]]
    asked += [(name, partial(opened.search_file, name, **how)) for name in queries]
    print_answer = _print_json if as_json else _csv_printer() if as_csv and asked else _print_answer
    n_answers = 0
    for name, answer in _answers(asked):
        n_answers += 1
        print_answer(printable(name) if as_csv or as_json or len(asked) > 1 else "", answer)
        if answer.note:
            note("short", printable(answer.note))
    if n_answers < len(asked):
        note("looked up", f"{n_answers:,} of {len(asked):,}")
        sys.exit(3 if n_answers else InputError.exit_code)


def _answers(asked: list[tuple[str, Callable[[], Answer]]]) -> Iterator[tuple[str, Answer]]:
    """Yield the name and the answer of each query; of several, those that cannot be looked up are told on stderr."""
    for name, ask in asked:
        try:
            yield name, ask()
        except InputError as exc:
            if len(asked) == 1:
                raise
            click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
            click.echo(printable(str(exc)), err=True)


def _print_json(name: str, answer: Answer) -> None:
    click.echo(json.dumps({"query": name, **answer.to_dict()}))


def _print_answer(title: str, answer: Answer) -> None:
    if title:
        click.secho(title, bold=True)
    with_singer = any(track.singer for track in answer.tracks)
    rows = [[f"{t.score:.2f}", t.path, *([t.singer or "-"] if with_singer else []), _where(t)] for t in answer.tracks]
    click.echo(aligned(["score", "track", *(["singer"] if with_singer else []), "where"], rows))
    if answer.singers:
        singers = [[f"{s.score:.2f}", percent(s.chance), str(s.n_tracks), s.singer] for s in answer.singers]
        click.echo("\n" + aligned(["score", "chance", "tracks", "singer"], singers))
    if answer.singers and answer.singers[0].chance is None:
        note("chance", "not calibrated: that takes four singers with two tracks or more, which are alike")


def _where(track: Any) -> str:
    places = [f"{_clock(match.query_seconds)} like {_clock(match.track_seconds)}" for match in track.matches]
    copies = "".join(f"; also {path}" for path in track.also[:_COPIES])
    more = f" and {len(track.also) - _COPIES:,} more" if len(track.also) > _COPIES else ""
    return ", ".join(places) + copies + more


def _clock(seconds: float) -> str:
    """`seconds` as minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _csv_printer() -> Callable[[str, Answer], None]:
    """Print the header; return what prints the rows of an answer."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(
        ["query", "kind", "score", "chance", "track_id", "path", "singer", "query_seconds", "track_seconds"]
    )

    def print_rows(query: str, answer: Answer) -> None:
        for track in answer.tracks:
            times = [
                ";".join(f"{getattr(m, side):g}" for m in track.matches) for side in ("query_seconds", "track_seconds")
            ]
            writer.writerow([query, "track", track.score, "", track.track_id, track.path, track.singer, *times])
        for singer in answer.singers:
            chance = "" if singer.chance is None else singer.chance
            writer.writerow([query, "singer", singer.score, chance, "", "", singer.singer, "", ""])

    return print_rows


def _screen(opened: Index, catalog: str, min_chance: float, as_csv: bool, as_json: bool) -> None:
    from singerembed.search.screening import false_alarms, screen

    alarms = false_alarms(opened, min_chance)
    note(
        "alarms",
        f"at chance {min_chance:g}, of 1,000 tracks: {alarms.unknown:.1f} false ones if their singers are not in the "
        f"index; if they are, {alarms.known:.1f} named as another and {alarms.found:.1f} as themselves "
        f"(on {alarms.n_tracks:,} tracks of the index)",
    )
    writer = csv.writer(sys.stdout, lineterminator="\n")
    if as_csv:
        writer.writerow(["track_id", "path", "credited", "rank", "singer", "score", "chance"])
    rows = []
    for track in screen(opened, catalog, min_chance):
        if as_json:
            singers = [{"singer": name, "score": score, "chance": chance} for name, score, chance in track.singers]
            click.echo(
                json.dumps(
                    {"track_id": track.track_id, "path": track.path, "credited": track.credited, "singers": singers}
                )
            )
        elif as_csv:
            for rank, found in enumerate(track.singers, start=1):
                writer.writerow([track.track_id, track.path, track.credited, rank, *found])
        else:
            name, score, chance = track.singers[0]
            rows.append([percent(chance), f"{score:.2f}", track.path, track.credited or "-", name])
    if not as_csv and not as_json:
        click.echo(aligned(["chance", "score", "track", "credited", "sounds like"], rows))
