"""The command group, and how errors become one line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from typing import Any

import click

from singerembed.cli.build_engine import build_engine
from singerembed.cli.cluster import cluster
from singerembed.cli.console import verbosity
from singerembed.cli.doctor import doctor
from singerembed.cli.evaluate import evaluate
from singerembed.cli.index import index
from singerembed.cli.inspect import inspect
from singerembed.cli.report import report
from singerembed.cli.run import run
from singerembed.cli.scan import scan
from singerembed.cli.search import search
from singerembed.cli.separate import separate
from singerembed.cli.serve import serve
from singerembed.cli.verify import verify
from singerembed.errors import SingerEmbedError, UsageError


class _Group(click.Group):
    """A command group that prints errors as one line and sets the exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click ends quietly where nobody reads on, as with `inspect | head`
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(128 + signal.SIGINT)
        except Exception as exc:
            if verbosity(ctx) > 0:
                traceback.print_exc()
            click.secho("Error: ", fg="red", bold=True, nl=False, err=True)
            if isinstance(exc, SingerEmbedError):
                click.echo(str(exc), err=True)
                ctx.exit(exc.exit_code)
            if (limit := _limit_reached(exc)) is not None:
                click.echo(limit, err=True)
                ctx.exit(1)
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
    singerembed scan folder catalog.csv         list the recordings in a folder, with their tags
    singerembed run catalog.csv out.parquet     embed every recording of a catalogue
    singerembed build-engine ckpt.pt            make an engine of a trained encoder
    singerembed index out.parquet out.index     make an index of what run has written
    singerembed search out.index demo.m4a       name the tracks and singers that sound most like it
    """


for _command in (
    scan, run, separate, build_engine, index, search, serve, verify, cluster, inspect, evaluate, report, doctor,
):  # fmt: skip
    cli.add_command(_command)


def _limit_reached(exc: Exception) -> str | None:
    """What to do about a limit of the system, if `exc` comes from one."""
    if isinstance(exc, MemoryError):
        return "no memory left (ulimit -v, or a limit of the container). Lower --workers, or raise the limit"
    if isinstance(exc, OSError) and exc.errno == errno.ENOSPC:
        return f"no space left on the device of {exc.filename or 'stdout'}. Free some and run the same command again"
    if isinstance(exc, RuntimeError) and "can't start new thread" in str(exc):
        return "no more threads may be started (ulimit -u, or a limit of the container). Lower --workers, or raise it"
    return None


def _prepare_process() -> None:
    """Open standard streams that are closed, and have names of files read as UTF-8, whatever the locale."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "r" if descriptor == 0 else "w", closefd=False))
    if sys.getfilesystemencoding().lower().replace("-", "") != "utf8":
        os.execv(sys.executable, [sys.executable, "-X", "utf8", "-P", "-m", "singerembed", *sys.argv[1:]])


def main() -> None:
    """Entry point of the `singerembed` command."""
    _prepare_process()
    if sys.argv[1:2] == ["run"] and hasattr(os, "fork"):
        from singerembed.jobs.supervisor import run_again_after_crashes

        run_again_after_crashes()
    # So that temporary files are removed. `run` has handlers of its own, which stop it at the end of a unit.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        cli(prog_name="singerembed")
    except UsageError as exc:  # raised while options are parsed
        click.echo(f"Error: {exc}", err=True)
        sys.exit(exc.exit_code)
