"""Options and output that the commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import click

_MAX_NUMBER = 1e9  # of an option; seconds of thirty years, which samples are still counted in


class NumberRange(click.FloatRange):
    """Numbers in a range, of which NaN and what has no use as an option are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Parse `value` as a float. Raises BadParameter."""
        number = super().convert(value, param, ctx)
        if abs(number) <= _MAX_NUMBER:
            return number
        return self.fail(f"{value!r} is no number between {-_MAX_NUMBER:.0e} and {_MAX_NUMBER:.0e}", param, ctx)


def verbosity(ctx: click.Context) -> int:
    """1 for --verbose, -1 for --quiet, else 0."""
    return int(ctx.meta.get("singerembed.verbosity", 0))


def verbosity_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command --quiet and --verbose."""

    def add(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            ctx.meta["singerembed.verbosity"] = 1 if parameter.name == "verbose" else -1

    for name, help_text in (
        ("--quiet/-q", "Print results and errors only."),
        ("--verbose/-v", "Print tracebacks of errors."),
    ):
        long, short = name.split("/")
        command = click.option(long, short, is_flag=True, expose_value=False, callback=add, help=help_text)(command)
    return command


def note(what: str, text: str) -> None:
    """Print one line on stderr: its subject and the text."""
    if verbosity(click.get_current_context()) >= 0:
        with suppress(OSError):  # nobody reads on, or the disk is full: notes are no reason to fail
            click.secho(f"{what:<12}", fg="cyan", nl=False, err=True)
            click.echo(text, err=True)


def count_or_all(_ctx: click.Context, _parameter: click.Parameter, value: str) -> int | None:
    """Parse a number of crops; None for `all`."""
    if value == "all":
        return None
    if value.isdecimal() and int(value) > 0:
        return int(value)
    raise click.BadParameter("give 'all' or a number of crops")


@contextmanager
def progress_bar(total: int | None, unit: str) -> Iterator[Callable[[str], object]]:
    """A progress bar on stderr, on a terminal only; what is yielded advances it by one and names what is at work.

    `total`: None if it is not known.
    """
    from tqdm import tqdm

    quiet = verbosity(click.get_current_context()) < 0 or total == 0
    with tqdm(total=total, unit=f" {unit}", disable=True if quiet else None, leave=False) as bar:

        def advance(name: str) -> None:
            bar.set_description(name, refresh=False)
            bar.update()

        yield advance


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in aligned columns, a line a row."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def percent(chance: float | None) -> str:
    """A chance for a table."""
    return "-" if chance is None else f"{100 * chance:.1f} %"
