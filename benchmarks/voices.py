"""Catalogues of isolated voices, and folders that are made of them once."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from singerembed.audio.limits import TimeLimit
from singerembed.audio.recording import open_recording
from singerembed.errors import CatalogError, InputError, OutputError, TrackError
from singerembed.model.mel import as_float
from singerembed.storage import resolve

RATE = 44_100
_LONGEST = 3600 * RATE
_NOTE = "made-of.json"


@dataclass(frozen=True)
class Voice:
    """A row of a catalogue."""

    path: str
    singer: str
    song: str

    def samples(self) -> NDArray[np.float32]:
        """Decode the recording: mono at 44.1 kHz, float32 [samples]. Raises InputError."""
        try:
            with open_recording(self.path, RATE, TimeLimit(600)) as reader:
                return as_float(reader.read(_LONGEST))
        except TrackError as exc:
            raise InputError(f"cannot read {self.path}: {exc}") from exc


def read_voices(catalog: str, song_column: str = "song") -> list[Voice]:
    """Read a CSV with the column path, and singer and `song_column` where it has them; else each row has its own."""
    try:
        with Path(catalog).open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as exc:
        raise CatalogError(f"cannot read the catalogue {catalog}: {getattr(exc, 'strerror', None) or exc}") from exc
    if not rows or not rows[0].get("path"):
        raise CatalogError(f"{catalog} has no column path, or no rows. Give a CSV with one recording a row")
    return [
        Voice(resolve(catalog, row["path"]), row.get("singer") or row["path"], row.get(song_column) or row["path"])
        for row in rows
    ]


def make_once(folder: Path, made_of: Mapping[str, object], make: Callable[[Path], None]) -> None:
    """Have `make` fill the new `folder`, unless it has been, of the same; `make` gets another name until it is done.

    Raises OutputError if `folder` holds something else.
    """
    note = json.dumps(made_of, indent=1, sort_keys=True)
    if folder.exists() and any(folder.iterdir()):
        found = (folder / _NOTE).read_text(encoding="utf-8") if (folder / _NOTE).exists() else ""
        if found != note:
            raise OutputError(
                f"{folder} was made of another catalogue or sound font, as {folder / _NOTE} says, or by hand. "
                "Give another --folder, or remove it"
            )
        return
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        unfinished.mkdir(parents=True)
        make(unfinished)
        (unfinished / _NOTE).write_text(note, encoding="utf-8")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def digest(catalog: str) -> str:
    """Return the SHA-256 of a catalogue's text."""
    return hashlib.sha256(Path(catalog).read_bytes()).hexdigest()
