"""The command `doctor`."""

from __future__ import annotations

import json

import click

from singerembed.cli.console import verbosity_options


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@verbosity_options
def doctor(as_json: bool) -> None:
    """Say what this machine can do, and what to install for what it cannot."""
    from singerembed.engine.machine import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps([finding.__dict__ for finding in findings]))
        return
    for finding in findings:
        click.secho("ok   " if finding.ok else "-    ", fg="green" if finding.ok else "yellow", nl=False)
        click.echo(f"{finding.subject:<18}{finding.text}")
