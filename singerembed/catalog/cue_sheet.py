"""Read a cue sheet: which stretches of one long file are the tracks of an album."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePosixPath

from singerembed import storage

_FRAMES_A_SECOND = 75  # a time is minutes:seconds:frames, in frames of a CD
_LINE = re.compile(r"\s*(?P<word>[A-Za-z]+)\s+(?P<rest>.*\S)\s*")
_TIME = re.compile(r"(\d{1,6}):(\d{1,6}):(\d{1,6})")
_NUMBER = re.compile(r"\d{1,9}")  # of a track: the catalogue has 32 bits for it
_MAX_BYTES = 1 << 20


@dataclass
class CueTrack:
    """A track: the stretch [start, end) of its file, in seconds."""

    number: int
    title: str | None = None
    performer: str | None = None
    start: float | None = None
    end: float | None = None  # None: the file's end


@dataclass
class CueFile:
    """A file that a cue sheet names, and its tracks in order."""

    name: str
    tracks: list[CueTrack] = field(default_factory=list)


@dataclass
class CueSheet:
    """The files of a cue sheet, and what it says of the album."""

    files: list[CueFile] = field(default_factory=list)
    title: str | None = None
    performer: str | None = None
    date: str | None = None
    genre: str | None = None

    def split_files(self) -> list[CueFile]:
        """The files that hold more than one track; the others are tracks as they are."""
        return [file for file in self.files if len(file.tracks) > 1]


def read_cue_sheet(path: str) -> CueSheet:
    """Read the cue sheet `path`, in UTF-8 or, where it is not, in the code page of Western Windows. Raises OSError.

    Tracks of data, and those without a place to begin at, are left out. A track ends where the next one begins (INDEX
    01), so that the pause between them belongs to the first.
    """
    with storage.open_input(path) as file:
        text = decoded(file.read(_MAX_BYTES))
    sheet = CueSheet()
    track: CueTrack | None = None
    for found in filter(None, map(_LINE.fullmatch, text.splitlines())):
        word, rest = found["word"].upper(), found["rest"]
        if word == "FILE":
            quoted = re.match(r'"([^"]*)"', rest)
            sheet.files.append(CueFile(quoted[1] if quoted else rest.rpartition(" ")[0] or rest))
            track = None
        elif word == "TRACK" and sheet.files:
            number, _, kind = rest.partition(" ")
            track = CueTrack(int(number) if _NUMBER.fullmatch(number) else len(sheet.files[-1].tracks) + 1)
            if kind.strip().upper() == "AUDIO":
                sheet.files[-1].tracks.append(track)
        elif word == "INDEX" and track is not None:
            number, _, time = rest.partition(" ")
            if number.lstrip("0") == "1" and (parts := _TIME.fullmatch(time.strip())):
                minutes, seconds, frames = map(int, parts.groups())
                track.start = 60 * minutes + seconds + frames / _FRAMES_A_SECOND
        else:
            _note(sheet, track, word, rest)
    for of_sheet in sheet.files:
        _order(of_sheet)
    return sheet


def decoded(content: bytes) -> str:
    """`content` as text, in the encoding that old players wrote where it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    return content.decode("utf-16" if content[:2] in {b"\xff\xfe", b"\xfe\xff"} else "cp1252", "replace")


def audio_name(named: str, names: list[str]) -> str | None:
    """Which of the recordings `names` in its folder a cue sheet means by `named`: that one, or its only other format.

    Albums are often encoded anew, and the sheet still names the WAV.
    """
    name = re.split(r"[/\\]", named)[-1]
    if name in names:
        return name
    same_stem = [other for other in names if PurePosixPath(other).stem.lower() == PurePosixPath(name).stem.lower()]
    return same_stem[0] if len(same_stem) == 1 else None


def _note(sheet: CueSheet, track: CueTrack | None, word: str, rest: str) -> None:
    """Take what the line says of the track, or of the album where no track has begun."""
    if word == "REM":
        word, _, rest = rest.partition(" ")
    value = rest.strip().strip('"').strip() or None
    name = {"TITLE": "title", "PERFORMER": "performer", "DATE": "date", "GENRE": "genre"}.get(word.upper())
    if name in {"title", "performer"} and (track is not None or not sheet.files):
        setattr(track or sheet, name, value)
    elif name in {"date", "genre"}:
        setattr(sheet, name, value)


def _order(file: CueFile) -> None:
    placed = sorted((track for track in file.tracks if track.start is not None), key=lambda track: track.start or 0.0)
    for track, following in pairwise(placed):
        track.end = following.start
    file.tracks = [track for track in placed if track.end is None or track.start is None or track.end > track.start]
