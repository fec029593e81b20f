"""Makes a function a command whose errors are one line."""

from __future__ import annotations

import functools
from collections.abc import Callable

import click

from singerembed.errors import SingerEmbedError


def command(function: Callable[..., None]) -> click.Command:
    """Return a click command that says `Error: ...` and exits with the error's code instead of showing a traceback."""

    @functools.wraps(function)
    def run(**arguments: object) -> None:
        try:
            function(**arguments)
        except SingerEmbedError as exc:
            click.echo(f"Error: {_message(exc)}", err=True)
            raise SystemExit(exc.exit_code) from exc

    return click.command(context_settings={"show_default": True})(run)


def _message(error: SingerEmbedError) -> str:
    """Return what `error` says. That of a DataLoader's worker comes with the worker's traceback before its message."""
    return str(error).rpartition(f"{type(error).__module__}.{type(error).__qualname__}: ")[2].strip()
