"""The command `inspect`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from singerembed.cli.console import verbosity_options


@click.command()
@click.argument("file")
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
@verbosity_options
def inspect(file: str, as_json: bool) -> None:
    """Say what FILE is, from what it was made, and how it was verified.

    FILE is an engine, a checkpoint, what run has written, or the .parts folder of an unfinished run.
    """
    from singerembed.jobs.describe import describe

    facts = describe(file)
    if as_json:
        click.echo(json.dumps(facts))
        return
    for line in _outline(facts):
        click.echo(line)


def _outline(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    width = max((len(key) for key in facts), default=0)
    for key, value in facts.items():
        if isinstance(value, dict):
            yield f"{indent}{key}"
            yield from _outline(value, indent + "  ")
        else:
            yield f"{indent}{key:<{width}}  {value}"
