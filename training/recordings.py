"""The recordings of a training set: found in a folder or a catalogue, split by singer, indexed in a Parquet file."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.dataset import dataset
from tqdm import tqdm

from singerembed.audio.limits import TimeLimit
from singerembed.audio.recording import open_recording
from singerembed.catalog.read import AUDIO_SUFFIXES, Catalog, Columns
from singerembed.errors import CatalogError, TrackError, UsageError
from singerembed.evaluation.data import is_output
from singerembed.output.finished import is_partitioned, read_schema
from singerembed.output.schema import ERROR, OK, SILENT
from singerembed.storage import exists, publishing, resolve, writing
from training.config import DataConfig, TrainConfig

TRAIN, VALIDATION = "train", "validation"
_COLUMNS = ("path", "singer", "seconds", "start", "split", "recording")
# The fields of DataConfig that, with the seed, determine an index.
_INDEX_FIELDS = {
    "source", "validation", "validation_fraction", "path_column", "singer_column", "crop_seconds",
    "audio_root",
}  # fmt: skip
_GAP_SECONDS = 1e-3  # between the crops of a run that follow each other
_PROBE_SECONDS = 60.0
_PROBE_SAMPLE_RATE = 44_100  # any rate: lengths are in seconds
_PROBE_THREADS = 8


@dataclass(frozen=True)
class Recording:
    """A file, or a part of one, and its singer."""

    path: str
    singer: str
    seconds: float = math.inf  # infinite: to the end of the file
    start: float = 0.0  # seconds from the beginning of the file
    split: str = TRAIN
    recording: str = ""  # what this is a stretch of, if there may be others of it; empty: a recording of its own


def build_index(config: TrainConfig) -> list[Recording]:
    """Find, measure and split the recordings of a run, in an order that depends only on their names.

    Recordings that cannot be opened, or are shorter than a crop, are left out and counted. Raises CatalogError if
    nothing is left to train on.
    """
    data, crop_seconds = config.data, config.front_end().crop_seconds
    training = measured(_find(data.source, config), data.crop_seconds)
    if data.validation:
        held_out = measured(_find(data.validation, config), crop_seconds)
        heard = {os.path.realpath(each.path) for each in training}
        shared = [each.path for each in held_out if os.path.realpath(each.path) in heard]
        if shared:
            raise UsageError(
                f"data.validation: {len(shared)} of its {len(held_out)} recordings are in {data.source} too (first: "
                f"{shared[0]}). Validate on others, or leave data.validation out: then singers are held out"
            )
    else:
        held_out_singers = _draw_singers({each.singer for each in training}, data.validation_fraction, config.seed)
        held_out = [each for each in training if each.singer in held_out_singers and each.seconds >= crop_seconds]
        if training and held_out_singers >= {each.singer for each in training}:
            raise CatalogError(
                f"{data.source}: all of its {len(held_out_singers)} singers would be kept for validation, which needs "
                "two. --set data.validation_fraction=0 trains on all of them, without validation"
            )
        training = [each for each in training if each.singer not in held_out_singers]
    if not training:
        raise CatalogError(f"{data.source}: no recording of {data.crop_seconds:g} s or more is left to train on")
    return training + [replace(each, split=VALIDATION) for each in held_out]


def write_index(path: Path, recordings: Sequence[Recording], config: TrainConfig) -> None:
    """Write the index of `config`, atomically."""
    columns = {name: [getattr(each, name) for each in recordings] for name in _COLUMNS}
    with writing(str(path)), publishing(str(path)) as temporary:
        pq.write_table(pa.table(columns).replace_schema_metadata({"asked": _index_key(config)}), temporary)


def is_index_of(path: Path, config: TrainConfig) -> bool:
    """Return whether `path` is an index of the data that `config` names."""
    return path.exists() and (pq.read_schema(path).metadata or {}).get(b"asked") == _index_key(config).encode()


def _index_key(config: TrainConfig) -> str:
    return json.dumps({"seed": config.seed, **config.data.model_dump(include=_INDEX_FIELDS)}, sort_keys=True)


def read_index(path: Path) -> list[Recording]:
    """Read an index written by `write_index`."""
    return [Recording(**row) for row in pq.read_table(path).to_pylist()]


def _find(source: str, config: TrainConfig) -> list[Recording]:
    if not exists(source):
        raise CatalogError(f"{source}: there is no such folder or catalogue")
    if is_partitioned(source):
        return list(in_output(source, config.data))
    if not Path(source).is_dir():
        if Path(source).suffix.lower() in {".parquet", ".pq"} and is_output(source):
            return list(in_output(source, config.data))
        return list(_in_catalogue(source, Columns(path=config.data.path_column), config.data.singer_column))
    found = sorted(_in_folder(Path(source)), key=lambda each: each.path)
    if not found:
        raise CatalogError(f"{source}: no recordings; looked for {', '.join(sorted(AUDIO_SUFFIXES))}")
    return found


def _in_folder(folder: Path) -> Iterator[Recording]:
    """Yield the files `folder/SINGER/**/*.wav`, and other formats. A file directly in `folder` is its own singer.

    Symbolic links are followed, except those to a parent folder.
    """
    for root, folders, names in os.walk(folder, followlinks=True):
        above = {each.resolve() for each in (Path(root), *Path(root).parents)}
        folders[:] = [name for name in folders if Path(root, name).resolve() not in above]
        for path in (Path(root, name) for name in names):
            if path.suffix.lower() in AUDIO_SUFFIXES and path.is_file():
                yield Recording(str(path), path.relative_to(folder).parts[0])


def _in_catalogue(path: str, columns: Columns, singer_column: str) -> Iterator[Recording]:
    """Yield the valid rows of a catalogue. A row without a singer is its own singer."""
    catalog = Catalog(path, columns)
    names = catalog.extra_schema().names
    known = singer_column in names
    if not known and singer_column != DataConfig().singer_column:
        raise CatalogError(
            f'{path} has no column "{singer_column}"; its other columns: {", ".join(names) or "none"}. '
            "Name the singers' with --set data.singer_column=NAME"
        )
    n_wrong, first = 0, ""
    for unit in catalog.units():
        singers = unit.extra[singer_column].to_pylist() if known else [None] * len(unit.tracks)
        for track, singer in zip(unit.tracks, singers, strict=True):
            if track.problem:
                n_wrong, first = n_wrong + 1, first or str(track.problem)
                continue
            seconds = math.inf if track.end is None else track.end - track.start
            name = _singer_of(singer, track.track_id) if known else track.track_id
            yield Recording(track.location, name, seconds, track.start)
    if n_wrong:
        tqdm.write(f"left out  {n_wrong} invalid rows of {path} (first: {first})")


def in_output(path: str, data: DataConfig) -> Iterator[Recording]:
    """Yield the stretches that a run embedded: neighbouring crops whose status is "ok", joined, with their lengths.

    Silence, crops with NaN and recordings that could not be read are left out. The singer is in the column
    `data.singer_column`; where there is none, each track is its own singer. Relative paths count from the folder
    `data.audio_root`, or from that of the output. Raises CatalogError without such a stretch.
    """
    schema = read_schema(path) if is_partitioned(path) else pq.read_schema(path)
    known = data.singer_column in schema.names
    if not known and data.singer_column != DataConfig().singer_column:
        raise CatalogError(f'{path} has no column "{data.singer_column}". Name the singers\' with data.singer_column')
    columns = ["track_id", "path", "start", "end", "status", *([data.singer_column] if known else [])]
    base = f"{data.audio_root}/" if data.audio_root else path
    counts: Counter[str] = Counter()
    last: Recording | None = None
    for batch in dataset(path, schema).to_batches(columns=columns):
        for row in batch.to_pylist():
            counts[row["status"]] += 1
            if row["status"] != OK:
                continue
            length = row["end"] - row["start"]
            follows = last is not None and last.recording == row["track_id"]
            if last is not None and follows and abs(last.start + last.seconds - row["start"]) < _GAP_SECONDS:
                last = replace(last, seconds=last.seconds + length)
                continue
            if last is not None:
                yield last
            singer = _singer_of(row[data.singer_column], row["track_id"]) if known else row["track_id"]
            location = resolve(base, row["path"])
            last = Recording(location, singer, length, row["start"], recording=row["track_id"])
    if last is None:
        raise CatalogError(f"{path}: a run embedded nothing in it; there is nothing to train on")
    yield last
    tqdm.write(f"read      {path}: {counts[OK]} crops, without {counts[SILENT]} silent ones and {counts[ERROR]} errors")


def _singer_of(credit: object, track_id: str) -> str:
    """Return a credited singer's name; a track without a credit is a singer of its own, whatever others are called."""
    nobody = credit is None or credit == "" or (isinstance(credit, float) and math.isnan(credit))
    return f"(nobody named) {track_id}" if nobody else str(credit)


def measured(recordings: Sequence[Recording], min_seconds: float) -> list[Recording]:
    """Return the recordings of at least `min_seconds`, with their lengths from the file headers if they have none."""
    with ThreadPoolExecutor(_PROBE_THREADS) as threads:
        lengths = list(
            tqdm(
                threads.map(_seconds, recordings),
                total=len(recordings),
                desc="reading headers",
                unit=" files",
                disable=None,
            )
        )
    unreadable = sum(length is None for length in lengths)
    kept = [
        replace(each, seconds=length)
        for each, length in zip(recordings, lengths, strict=True)
        if length is not None and length >= min_seconds
    ]
    if len(kept) < len(recordings):
        short = len(recordings) - len(kept) - unreadable
        tqdm.write(
            f"left out  {unreadable} recordings that cannot be opened, {short} shorter than {min_seconds:g} s; "
            f"{len(kept)} of {len(recordings)} are used"
        )
    return kept


def _seconds(recording: Recording) -> float | None:
    """Return the length of a recording in seconds; None if it cannot be opened."""
    if recording.recording:
        return recording.seconds  # a run has read it
    limit = TimeLimit(_PROBE_SECONDS)
    try:
        with limit.counting(), open_recording(recording.path, _PROBE_SAMPLE_RATE, limit) as reader:
            length = reader.length() / reader.sample_rate
    except TrackError:
        return None
    return min(length - recording.start, recording.seconds)


def _draw_singers(singers: set[str], fraction: float, seed: int) -> set[str]:
    """Draw `fraction` of the singers; at least two unless it is 0, because error rates need two."""
    if fraction == 0:
        return set()
    count = max(2, round(fraction * len(singers)))
    order = np.random.default_rng(seed).permutation(sorted(singers))
    return set(order[:count].tolist())
