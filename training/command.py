"""Turns functions into click commands that report errors on one line."""

from __future__ import annotations

import functools
from collections.abc import Callable

import click

from singerembed.errors import SingerEmbedError


def command(function: Callable[..., None]) -> click.Command:
    """Return a click command that prints `Error: ...` and exits with the error's code instead of a traceback."""

    @functools.wraps(function)
    def run(**arguments: object) -> None:
        try:
            function(**arguments)
        except SingerEmbedError as exc:
            click.echo(f"Error: {_message(exc)}", err=True)
            raise SystemExit(exc.exit_code) from exc

    return click.command(context_settings={"show_default": True})(run)


def _message(error: SingerEmbedError) -> str:
    """Return the message of `error`, without the traceback that a DataLoader worker puts before it."""
    return str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2].strip()
