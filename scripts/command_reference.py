"""Print the command reference: what `singerembed --help` and the help of every command say, as Markdown.

python scripts/command_reference.py > commands.md

The site is built with it (scripts/docs_hooks.py), so that no copy of a help text can grow old.
"""

from __future__ import annotations

import click

from singerembed.cli.main import cli

_WIDTH = 100  # characters that fit the site's column (docs/site.css)
_INTRODUCTION = """\
# Commands

What the programs themselves print with `--help`. Results go to standard output, everything else to standard error;
`--json` gives results as JSON. What went wrong is one line that begins with `Error:`.

| exit code | meaning |
| --- | --- |
| 0 | all well |
| 1 | could not run, or had to stop |
| 2 | the command line is wrong |
| 3 | `run`: finished, with rows of `status = 'error'` or missing files |
| 3 | `scan` and `run`: without folders that could not be read |
| 3 | `separate`: some recordings could not be separated |
| 4 | `run`: the deadline came first |
| 129, 130, 143 | interrupted by SIGHUP, SIGINT, SIGTERM |
"""


def help_texts(group: click.Group = cli) -> dict[str, str]:
    """Return what `--help` prints, of the group itself and of each command, by the words that are typed."""
    name = "singerembed"
    settings = {**group.context_settings, "terminal_width": _WIDTH, "max_content_width": _WIDTH}
    with click.Context(group, info_name=name, **settings) as parent:
        texts = {name: group.get_help(parent)}
        for command in group.commands.values():
            with click.Context(command, info_name=command.name, parent=parent) as context:
                texts[context.command_path] = command.get_help(context)
    return texts


def render(group: click.Group = cli) -> str:
    """Return the page."""
    sections = [f"## {words}\n\n```text\n{text.rstrip()}\n```\n" for words, text in help_texts(group).items()]
    return "\n".join([_INTRODUCTION, *sections])


if __name__ == "__main__":
    click.echo(render(), nl=False)
