"""Options of the commands that read a catalogue: how its text is written, and which columns mean what."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from singerembed.catalog.read import Columns


def _pairs(_ctx: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = dict(value.partition("=")[::2] for value in values)
    if not all(pairs) or not all(pairs.values()):
        raise click.BadParameter("write OLD=NEW")
    return pairs


_OPTIONS = [
    click.option(
        "--delimiter", metavar="CHAR", help="What separates the fields of a CSV.  [default: found by the first line]"
    ),
    click.option(
        "--encoding", metavar="NAME", help="Encoding of a text catalogue.  [default: by its byte-order mark, or UTF-8]"
    ),
    click.option(
        "--quoting",
        type=click.Choice(["csv", "none"]),
        help="Whether quotes surround fields or are part of them.  [default: csv; none for .tsv]",
    ),
    click.option("--path-column", default="path", show_default=True, help="The catalogue's column of paths."),
    click.option("--id-column", default="track_id", show_default=True, help="The catalogue's column of track names."),
    click.option(
        "--rename",
        multiple=True,
        metavar="OLD=NEW",
        callback=_pairs,
        help="Store the catalogue's column OLD as NEW; may be repeated.",
    ),
]


def catalog_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of `columns_of`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def columns_of(values: dict[str, Any], vocals: str | None = None) -> Columns:
    """What the options among `values` say of the catalogue; `vocals`: its column of stems. Raises UsageError."""
    from singerembed.catalog.layout import TextOptions
    from singerembed.catalog.read import Columns

    delimiter = "\t" if values["delimiter"] in {"\\t", "tab"} else values["delimiter"]
    text = TextOptions(delimiter, values["encoding"], values["quoting"])
    return Columns(values["path_column"], values["id_column"], values["rename"], text, vocals)
