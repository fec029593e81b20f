"""Embed the recordings that are looked up: the same decoding, separation, crops and engine as in a run."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from singerembed.audio.crops import CropBlock, CropPlan, read_crops
from singerembed.audio.limits import DEFAULT_TRACK_TIMEOUT_SECONDS, TimeLimit
from singerembed.audio.reader import PcmReader
from singerembed.audio.recording import open_recording
from singerembed.engine.base import EmbeddedCrops, Engine
from singerembed.engine.file import read_engine_file, read_separator_file
from singerembed.engine.load import bundled_engine_path, open_engine
from singerembed.engine.separation import MAX_BLOCK, Separation, open_separation
from singerembed.errors import InputError, TrackError, UsageError
from singerembed.model.mel import DEFAULT_SILENCE_DBFS, LOUD, SILENT
from singerembed.model.spec import BUNDLED_NAME, ModelSpec
from singerembed.search.library import check_engine
from singerembed.search.store import StoredIndex


@dataclass(frozen=True)
class QueryCrops:
    """The loud crops of a query; at least one."""

    note: str  # what a person should know of the query; empty: nothing
    start: NDArray[np.float64]  # [n], seconds
    embedding: NDArray[np.float32]  # [n, dim]


def open_engine_of(index: StoredIndex, path: str | None) -> Engine:
    """Open the engine file `path` (None: the bundled engine), which must be the index's. Raises UsageError if not."""
    if path is None and index.engine["name"] != BUNDLED_NAME:
        raise UsageError(
            f"{index.folder} was made with the engine {index.engine['name']} ({index.engine['sha256'][:12]}...): name "
            "its file with --engine"
        )
    file = read_engine_file(path or bundled_engine_path())
    found = {"name": file.spec.name, "sha256": file.sha256}
    check_engine(found, index.engine, path or "the bundled engine", str(index.folder))
    return open_engine(file)


def open_separation_of(index: StoredIndex, path: str | None, spec: ModelSpec) -> Separation | None:
    """Open the separator engine `path`, which must be the one that the index's voices came out of; None where none did.

    `spec`: of the index's engine. Raises UsageError and EngineError.
    """
    wanted = index.separator
    if wanted is None:
        if path is not None:
            raise UsageError(f"{index.folder} was made of recordings as they are. Leave --separate out")
        return None
    called = f"the separator {wanted['name']} ({wanted['sha256'][:12]}...)"
    if path is None:
        raise UsageError(f"{index.folder} holds voices that {called} took out of mixes: name its file with --separate")
    file = read_separator_file(path)
    if file.sha256 != wanted["sha256"]:
        raise UsageError(
            f"{path} is the separator {file.spec.name} ({file.sha256[:12]}...), and {index.folder} was made with "
            f"{called}: their voices cannot be compared"
        )
    return open_separation(file, spec, wanted["min_vocals_db"], DEFAULT_SILENCE_DBFS)


class TooLong(InputError):
    """A recording is longer than whoever looks it up allows."""


def embed_recording(
    path: str,
    engine: Engine,
    separation: Separation | None = None,
    *,
    name: str | None = None,
    max_seconds: float = float("inf"),
    is_stopped: Callable[[], bool] = lambda: False,
) -> QueryCrops:
    """Embed all consecutive crops of the recording `path`, or the voice in them. `name`: what errors call it.

    `is_stopped` is asked between blocks of crops; those that there are by then will do if it says so.
    One that is shorter than a crop is padded with silence, as `run` does. Raises InputError if it cannot be decoded, is
    silent, or nobody sings in it, and TooLong, which is one, if it is longer than `max_seconds`.
    """
    spec, name = engine.spec, name or path
    start, embedding = list[float](), list[NDArray[np.float32]]()
    n_crops = n_silent = 0
    seconds = 0.0
    channels = separation.channels if separation else 1
    plan = CropPlan(spec.crop_samples, spec.crop_samples, None)
    try:
        limit = TimeLimit(DEFAULT_TRACK_TIMEOUT_SECONDS)
        with open_recording(path, spec.sample_rate, limit, channels=channels) as reader:
            for block, result in _embedded(reader, plan, engine, separation):
                n_crops += len(result.state)
                n_silent += int((result.state == SILENT).sum())
                seconds = float(block.stop[-1]) / spec.sample_rate
                start += (block.start[result.state == LOUD] / spec.sample_rate).tolist()
                embedding.append(result.embedding)
                if seconds > max_seconds:
                    raise TooLong(f"{name} is longer than {max_seconds / 60:g} minutes. Give a part of it")
                if is_stopped():
                    break
    except TrackError as exc:
        if not start:
            raise InputError(f"{name} cannot be looked up: {exc}") from exc
    if not start and separation and n_silent < n_crops:
        raise InputError(f"in {name} nobody seems to sing: none of its {n_crops} crops has a voice. Give another part")
    if not start:
        raise InputError(
            f"{name} is silent: none of its {n_crops} crops is louder than -60 dBFS. Give another recording"
        )
    return QueryCrops(note_on_length(name, seconds, spec), np.array(start), np.concatenate(embedding))


def note_on_length(name: str, seconds: float, spec: ModelSpec) -> str:
    """What to say of a query that is shorter than a crop; empty for others."""
    if seconds >= spec.crop_seconds:
        return ""
    return f"{name} lasts {seconds:.1f} s, and a crop {spec.crop_seconds:g} s: what it is like is the less certain"


def embed_separated(audio: NDArray[Any], sample_rate: int, engine: Engine, separation: Separation) -> QueryCrops:
    """Embed the voice in all consecutive crops of `audio`, [samples] or [samples, channels], as a recording's.

    Raises ValueError for audio that is unfit, silent, or in which nobody sings.
    """
    with tempfile.TemporaryDirectory(prefix="singerembed-") as folder:
        path = str(Path(folder) / "query.wav")
        try:
            soundfile.write(path, audio, sample_rate, subtype="FLOAT")
            return embed_recording(path, engine, separation, name="the audio")
        except (InputError, soundfile.LibsndfileError, TypeError) as exc:
            raise ValueError(str(exc)) from exc


def _embedded(
    reader: PcmReader, plan: CropPlan, engine: Engine, separation: Separation | None
) -> Iterator[tuple[CropBlock, EmbeddedCrops]]:
    if separation is None:
        for block in read_crops(reader, plan, engine.batch):
            yield block, engine.embed(block.pcm)
    else:
        for around in read_crops(*separation.surrounded(reader, plan), min(engine.batch, MAX_BLOCK)):
            block, embedded, _ratio = separation.embed(around, engine)
            yield block, embedded
