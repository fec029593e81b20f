"""Read the tags of a recording, and how long its header says it is.

TinyTag (MIT, Python alone) reads the containers that music is kept in, from object storage too. What it does not know
is opened with FFmpeg in another process (foreign_tags.py), where a demuxer may crash.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from tinytag import TinyTag, TinyTagException

from singerembed import storage
from singerembed.catalog.foreign_tags import ForeignTags
from singerembed.storage import printable

_NUMBER_DIGITS = 9  # of the number of a track: the catalogue has 32 bits for it
_MUSICBRAINZ_OWNER = "http://musicbrainz.org"


class Tags(NamedTuple):
    """What a recording says of itself; None: it does not say."""

    duration: float | None = None  # seconds, by the header
    artist: str | None = None
    album_artist: str | None = None
    title: str | None = None
    album: str | None = None
    track: int | None = None  # its number on the album
    year: int | None = None
    genre: str | None = None
    musicbrainz_trackid: str | None = None  # of the recording: taggers write it under this name
    musicbrainz_artistid: str | None = None  # several are joined with "; "


class TagReader:
    """Reads tags; may be called from several threads. Must be closed."""

    def __init__(self) -> None:
        self._foreign = ForeignTags()

    def read(self, path: str) -> Tags:
        """Read the tags of `path`; of a file that cannot be read, or is no recording, there are none.

        What the run finds wrong with it becomes an error row there.
        """
        if TinyTag.is_supported(PurePosixPath(path).name):
            return _with_tinytag(path)
        if storage.is_remote(path):
            return Tags()
        found = self._foreign.read(path)
        tags = _of_ffmpeg(found)
        # Of the ID3 tag that some programs put before a file of another format, FFmpeg reads a part or nothing.
        return (
            _with_tinytag(path, duration=False)._replace(duration=tags.duration) if found and _has_id3(path) else tags
        )

    def close(self) -> None:
        """End the process of FFmpeg."""
        self._foreign.close()


def _has_id3(path: str) -> bool:
    try:
        with storage.open_input(path) as file:
            return file.read(3) == b"ID3"
    except OSError:
        return False


def _with_tinytag(path: str, *, duration: bool = True) -> Tags:
    try:
        with storage.open_input(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = TinyTag.get(path, file_obj=file, duration=duration)
    except (TinyTagException, OSError, ValueError):
        return Tags()
    except Exception:  # each file system of fsspec has exceptions of its own, and a strange file may meet any mistake
        return Tags()
    other = found.other
    recording = [
        value.removeprefix(_MUSICBRAINZ_OWNER) for value in other.get("ufid", []) if _MUSICBRAINZ_OWNER in value
    ]
    return Tags(
        duration=_seconds(found.duration),
        artist=_text(found.artist),
        album_artist=_text(found.albumartist),
        title=_text(found.title),
        album=_text(found.album),
        track=_number(found.track),
        year=_year(found.year),
        genre=_text(found.genre),
        musicbrainz_trackid=_ids(_named(other, "musicbrainztrackid") or recording),
        musicbrainz_artistid=_ids(_named(other, "musicbrainzartistid")),
    )


def _of_ffmpeg(found: dict[str, Any]) -> Tags:
    """The tags in what FFmpeg found."""
    texts = {_plain(name): [value] for name, value in found.get("tags", {}).items()}

    def first(*names: str) -> str | None:
        return next((text for name in names for text in map(_text, texts.get(name, [])) if text), None)

    number = re.match(r"\d+", first("track", "tracknumber") or "")
    return Tags(
        duration=_seconds(found.get("seconds")),
        artist=first("artist"),
        album_artist=first("albumartist"),
        title=first("title"),
        album=first("album"),
        track=_number(number[0]) if number else None,
        year=_year(first("date", "year")),
        genre=first("genre"),
        musicbrainz_trackid=_ids(texts.get("musicbrainztrackid", [])),
        musicbrainz_artistid=_ids(texts.get("musicbrainzartistid", [])),
    )


def _plain(name: str) -> str:
    """`name` without what taggers spell in different ways: MUSICBRAINZ_TRACKID, MusicBrainz Track Id, ..."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _named(other: dict[str, list[str]], name: str) -> list[str]:
    return [value for key, values in other.items() if _plain(key) == name for value in values]


def _text(value: str | None) -> str | None:
    """`value` on one line, fit for any catalogue; None where nothing is left."""
    return printable(" ".join(value.replace("\0", " ").split())) or None if value else None


def _ids(values: Iterable[str]) -> str | None:
    words = [word for value in values for word in re.split(r"[\s\0;/,]+", printable(value)) if word]
    return "; ".join(dict.fromkeys(words)) or None


def _number(value: int | str | None) -> int | None:
    """The number of a track; None for one that no album has, as where a date stands in its place."""
    digits = str(value or "")
    return int(digits) or None if digits.isdecimal() and len(digits) <= _NUMBER_DIGITS else None


def _year(value: str | None) -> int | None:
    found = re.search(r"(?<!\d)\d{4}(?!\d)", value or "")
    return int(found[0]) or None if found else None


def _seconds(value: float | None) -> float | None:
    return round(value, 3) if value is not None and 0 < value < 1e9 else None
