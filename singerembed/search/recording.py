"""Embed the recordings that are looked up: the same decoding, crops and engine as in a run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from singerembed.audio.crops import CropPlan, read_crops
from singerembed.audio.limits import DEFAULT_TRACK_TIMEOUT_SECONDS, TimeLimit
from singerembed.audio.recording import open_recording
from singerembed.engine.base import Engine
from singerembed.engine.file import read_engine_file
from singerembed.engine.load import bundled_engine_path, open_engine
from singerembed.errors import TrackError, UsageError
from singerembed.model.mel import LOUD
from singerembed.model.spec import BUNDLED_NAME
from singerembed.search.library import check_engine
from singerembed.search.store import StoredIndex


@dataclass(frozen=True)
class QueryCrops:
    """The loud crops of a query; at least one."""

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


class TooLong(UsageError):
    """A recording is longer than whoever looks it up allows."""


def embed_recording(
    path: str, engine: Engine, *, name: str | None = None, max_seconds: float = float("inf")
) -> QueryCrops:
    """Embed all consecutive crops of the recording `path`. `name`: what errors call it (default: `path`).

    Raises UsageError if it cannot be decoded, is shorter than a crop, or is silent, and TooLong, which is one, if it is
    longer than `max_seconds`.
    """
    spec, name = engine.spec, name or path
    start, embedding = list[float](), list[NDArray[np.float32]]()
    n_crops, seconds = 0, 0.0
    try:
        with open_recording(path, spec.sample_rate, TimeLimit(DEFAULT_TRACK_TIMEOUT_SECONDS)) as reader:
            for block in read_crops(reader, CropPlan(spec.crop_samples, spec.crop_samples, None), engine.batch):
                result = engine.embed(block.pcm)
                n_crops += len(result.state)
                seconds = float(block.stop[-1]) / spec.sample_rate
                start += (block.start[result.state == LOUD] / spec.sample_rate).tolist()
                embedding.append(result.embedding)
                if seconds > max_seconds:
                    raise TooLong(f"{name} is longer than {max_seconds / 60:g} minutes. Give a part of it")
    except TrackError as exc:
        if not start:
            raise UsageError(f"{name} cannot be looked up: {exc}") from exc
    if seconds < spec.crop_seconds:
        raise UsageError(
            f"{name} is too short: {seconds:.1f} s, and a crop takes {spec.crop_seconds:g} s. Give a longer recording"
        )
    if not start:
        raise UsageError(
            f"{name} is silent: none of its {n_crops} crops is louder than -60 dBFS. Give another recording"
        )
    return QueryCrops(np.array(start), np.concatenate(embedding))
