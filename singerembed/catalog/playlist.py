"""Read a playlist: the paths in an .m3u, .m3u8 or .pls file."""

from __future__ import annotations

import os
import re

from singerembed import storage
from singerembed.catalog.cue_sheet import decoded

PLAYLIST_SUFFIXES = {".m3u", ".m3u8", ".pls"}
_PLS_FILE = re.compile(r"\s*File(\d+)\s*=\s*(.*\S)\s*", re.IGNORECASE)


def read_playlist(path: str) -> list[str]:
    """The entries of the playlist `path` in order: local paths and URIs, resolved against its folder. Raises OSError.

    A file that is not there stays in the list; a run says so.
    """
    with storage.open_input(path) as file:
        content = file.read()
    if path.lower().endswith(".pls"):
        numbered = [
            (int(found[1]), found[2]) for found in map(_PLS_FILE.fullmatch, decoded(content).splitlines()) if found
        ]
        return [_found(path, entry) for _, entry in sorted(numbered, key=lambda pair: pair[0])]
    lines = [line.strip() for line in content.removeprefix(b"\xef\xbb\xbf").splitlines()]
    return [_found(path, os.fsdecode(line), line) for line in lines if line and not line.startswith(b"#")]


def _found(playlist: str, entry: str, content: bytes = b"") -> str:
    """Where `entry` is. Names are bytes: those of an .m3u from Windows may need another encoding, and other slashes."""
    first = storage.resolve(playlist, entry)
    if storage.is_remote(first):
        return first
    candidates = [entry, decoded(content)] if content else [entry]
    candidates += [candidate.replace("\\", "/") for candidate in candidates]
    places = [storage.resolve(playlist, candidate) for candidate in candidates]
    return next((place for place in places if os.path.exists(place)), first)  # noqa: PTH110  (may hold a NUL)
