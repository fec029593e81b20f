"""The command `serve`."""

from __future__ import annotations

import os

import click

from singerembed import storage
from singerembed.cli.console import note, verbosity_options

_LOOKED_FOR = 20  # recordings, to see whether the page can play them


@click.command()
@click.argument("index")
@click.option("--engine", metavar="FILE", help="The engine that made the index.  [default: the bundled one]")
@click.option(
    "--separate",
    metavar="FILE",
    help="The separator that the index's voices came out of, where it was made with run --separate.",
)
@click.option("--audio-root", metavar="FOLDER", help="What paths count from.  [default: the index's folder]")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="The address to listen on.")
@click.option("--port", type=click.IntRange(0, 65_535), default=8765, show_default=True, help="0: one that is free.")
@verbosity_options
def serve(index: str, engine: str | None, separate: str | None, audio_root: str | None, host: str, port: int) -> None:
    """Serve a page on which a recording is dropped, and the nearest singers and tracks of INDEX are heard.

    For this machine alone, unless --host says otherwise: there is no login, and whoever reaches the page can listen to
    the tracks of the index. Nothing that is dropped is kept. Ctrl-C ends it. Needs the extras search and serve.

    \b
    singerembed serve library.index --audio-root ~/Music
    """
    from singerembed.search.query import open_index
    from singerembed.search.serve import LOOPBACK, Recordings, listen, make_app
    from singerembed.search.serve import serve as serve_app

    opened = open_index(index, engine, separate)
    root = storage.resolve(index.rstrip("/"), "") if audio_root is None else os.path.join(audio_root, "")  # noqa: PTH118
    recordings = Recordings(opened, root)
    is_local = host in LOOPBACK
    app = make_app(opened, recordings, LOOPBACK if is_local else None)
    listener = listen(host, port)
    name = f"[{host}]" if ":" in host else host
    click.echo(f"http://{name}:{listener.getsockname()[1]}/")
    if not is_local:
        note("warning", "whoever reaches this machine can look up recordings and listen to the tracks of the index")
    paths = opened.stored.tracks["path"]
    if len(paths) and not any(recordings.file(number) for number in range(min(len(paths), _LOOKED_FOR))):
        place = storage.resolve(root, paths[0].as_py())
        note(
            "warning",
            f"the page cannot play the recordings: {place} is not there, or in no format that browsers play. Name the "
            "folder that paths count from with --audio-root",
        )
    note("serving", f"{index}, until Ctrl-C")
    serve_app(app, listener)
