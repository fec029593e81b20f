"""The command group, and how errors become one line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

import click

from singerembed.cli.build_engine import build_engine
from singerembed.cli.console import verbosity
from singerembed.cli.doctor import doctor
from singerembed.cli.evaluate import evaluate
from singerembed.cli.inspect import inspect
from singerembed.cli.report import report
from singerembed.cli.run import run
from singerembed.errors import SingerEmbedError, UsageError


class _Group(click.Group):
    """A command group that prints errors as one line and sets the exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click ends quietly where nobody reads on, as with `inspect | head`
        except Exception as exc:
            if verbosity(ctx) > 0:
                traceback.print_exc()
            click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
            if isinstance(exc, SingerEmbedError):
                click.echo(str(exc), err=True)
                ctx.exit(exc.exit_code)
            click.echo(
                f"a mistake in singerembed itself: {type(exc).__name__}: {exc}. Run it with -v and report that",
                err=True,
            )
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="singerembed")
def cli() -> None:
    """Singer identity embeddings for whole music libraries.

    \b
    singerembed run catalog.csv out.parquet     embed every recording of a catalogue
    singerembed build-engine ckpt.pt            make an engine of a trained encoder
    """


for _command in (run, build_engine, inspect, evaluate, report, doctor):
    cli.add_command(_command)


def main() -> None:
    """Entry point of the `singerembed` command."""
    if sys.argv[1:2] == ["run"] and hasattr(os, "fork"):
        from singerembed.jobs.supervisor import run_again_after_crashes

        run_again_after_crashes()
    try:
        cli(prog_name="singerembed")
    except UsageError as exc:  # raised while options are parsed
        click.echo(f"Error: {exc}", err=True)
        sys.exit(exc.exit_code)
