"""Reads labelled recordings: a folder with one sub-folder per singer, a catalogue, or the output of `run`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow.dataset import dataset

from singerembed import storage
from singerembed.catalog.read import AUDIO_SUFFIXES, Catalog, Columns
from singerembed.errors import InputError, UsageError
from singerembed.output.finished import is_partitioned, read_schema
from singerembed.output.schema import METADATA_KEY, NO_VOICE, OK, RESERVED_COLUMNS, SILENT
from singerembed.storage import portable

DEFAULT_SINGER_COLUMN = "singer"


@dataclass(frozen=True)
class Recording:
    """A labelled recording, or the part of one that a catalogue row names."""

    name: str  # path as in the folder or the catalogue; pair files use it
    location: str  # path or URL to open
    singer: str
    start: float = 0.0  # seconds
    end: float | None = None  # seconds; None: end of the recording
    conditions: dict[str, str] = field(default_factory=dict)  # the catalogue's other columns


@dataclass(frozen=True)
class StoredEmbeddings:
    """The embeddings in an output of `run`."""

    recording: NDArray[np.int64]  # [n], index of the crop's recording
    start: NDArray[np.float64]  # [n], seconds
    embedding: NDArray[np.float32]  # [n, dim]
    n_silent: int  # or without voice
    n_errors: int
    metadata: dict[str, Any]  # of the run: engine, spec, options


@dataclass(frozen=True)
class LabelledData:
    """Recordings with singers, and their embeddings if the source has them."""

    source: str
    recordings: list[Recording]
    stored: StoredEmbeddings | None = None
    notes: list[str] = field(default_factory=list)  # for display: what was left out


def read_labelled(
    source: str, singer_column: str | None = None, path_column: str = Columns.path, audio_root: str | None = None
) -> LabelledData:
    """Read `source`: a folder, a catalogue, or a Parquet output of `run`.

    `singer_column`: of a catalogue or an output; default `singer`. `audio_root`: base of relative paths in an output,
    for models that read the audio; default the output's own folder.
    Raises InputError or CatalogError if `source` is none of these, UsageError if it has no singer column.
    """
    if is_partitioned(source):
        return read_output(source.rstrip("/"), singer_column, audio_root)
    if Path(source).is_dir():
        return _read_folder(source)
    if not Path(source).exists():
        raise InputError(f"{source}: no such file or folder")
    if Path(source).suffix.lower() in {".parquet", ".pq"} and is_output(source):
        return read_output(source, singer_column, audio_root)
    return _read_catalog(source, singer_column or DEFAULT_SINGER_COLUMN, path_column)


def is_output(path: str) -> bool:
    """Return whether the Parquet file or folder `path` was written by `run`. Raises InputError if it is not Parquet."""
    if is_partitioned(path):
        return True
    try:
        return METADATA_KEY in (pq.read_schema(path).metadata or {})
    except (pa.ArrowException, OSError) as exc:
        raise InputError(f"cannot read {path} as Parquet: {exc}") from exc


def _read_folder(folder: str) -> LabelledData:
    root = Path(folder)
    recordings, stray = [], 0
    for path in _audio_files(root):
        parts = path.relative_to(root).parts
        if len(parts) == 1:
            stray += 1
            continue
        recordings.append(Recording("/".join(parts), str(path), parts[0]))
    if not recordings:
        raise InputError(
            f"{folder} holds no recordings as <singer>/<name>.wav; sort them into a folder for each singer"
        )
    notes = [f"{stray} recordings lie in no singer's folder and are left out"] if stray else []
    return LabelledData(folder, recordings, notes=notes)


def _audio_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders.sort()
        yield from (Path(folder) / name for name in sorted(names) if Path(name).suffix.lower() in AUDIO_SUFFIXES)


def _read_catalog(path: str, singer_column: str, path_column: str) -> LabelledData:
    catalog = Catalog(path, Columns(path=path_column))
    names = catalog.extra_schema().names
    if singer_column not in names:
        raise UsageError(
            f'{path} has no column "{singer_column}"; it has: {", ".join(names)}. Name it with --singer-column'
        )
    recordings, unlabelled, bad = [], 0, 0
    for unit in catalog.units():
        for track, row in zip(unit.tracks, unit.extra.to_pylist(), strict=True):
            values = {name: _as_text(value) for name, value in row.items()}
            singer = values.pop(singer_column)
            if track.problem or not singer:
                bad, unlabelled = bad + bool(track.problem), unlabelled + (not track.problem)
                continue
            recordings.append(Recording(portable(track.path), track.location, singer, track.start, track.end, values))
    if not recordings:
        raise InputError(f'{path}: no row has both a path and a value in "{singer_column}"')
    notes = [f"{unlabelled} rows without a singer are left out"] if unlabelled else []
    notes += [f"{bad} rows cannot be read and are left out"] if bad else []
    return LabelledData(path, recordings, notes=notes)


def _as_text(value: object) -> str:
    return "" if value is None else str(value)


# --- output of `run` ------------------------------------------------------------------------------------------------


def read_output(path: str, singer_column: str | None, audio_root: str | None = None) -> LabelledData:
    """Read an output of `run`. Rows without an embedding are only counted. Raises UsageError without singer column."""
    partitioned = is_partitioned(path)
    schema = read_schema(path) if partitioned else pq.read_schema(path)
    column = singer_column or DEFAULT_SINGER_COLUMN
    others = [name for name in schema.names if name not in RESERVED_COLUMNS]
    if column not in others and column not in {"track_id", "path"}:
        raise UsageError(
            f'{path} has no column "{column}"; it has: {", ".join(others) or "none of the catalogue"}. '
            "Name it with --singer-column (track_id: each recording for itself)"
        )
    parts = [name for name in ("track_start", "track_end") if name in schema.names]  # an earlier version had none
    wanted = dict.fromkeys(["track_id", "path", "start", "status", *parts, *others])
    labels, embeddings = [], []
    for batch in dataset(path, schema).to_batches(columns=[*wanted, "embedding"], batch_size=4096):
        table = pa.Table.from_batches([batch])
        ok = pa.array(table["status"].to_numpy() == OK)
        labels.append(table.select(list(wanted)))
        rows = table["embedding"].filter(ok).combine_chunks()
        embeddings.append(np.asarray(rows.flatten(), np.float32).reshape(-1, schema.field("embedding").type.list_size))
    if not labels:
        raise InputError(f"{path} holds no rows")
    metadata = json.loads(schema.metadata[METADATA_KEY])
    base = storage.resolve(path, "") if audio_root is None else os.path.join(audio_root, "")  # noqa: PTH118
    return _stored(path, base, pa.concat_tables(labels), np.concatenate(embeddings), column, metadata)


def _stored(
    path: str, base: str, rows: pa.Table, embedding: NDArray[np.float32], column: str, metadata: dict[str, Any]
) -> LabelledData:
    status = rows["status"].to_numpy()
    ok = np.flatnonzero(status == OK)
    unheard = np.isin(status.astype(str), [SILENT, NO_VOICE])
    found = rows.take(pa.array(ok))
    singers = [_as_text(value) for value in found[column].to_pylist()]
    labelled = np.array([singer != "" for singer in singers], bool)
    if not labelled.any():
        raise InputError(f'{path}: no embedded row has a value in "{column}"')
    recordings: dict[tuple[str, str, float, float | None], int] = {}
    of_row, made = list[int](), list[Recording]()
    conditions = [name for name in found.column_names if name not in RESERVED_COLUMNS and name != column]
    for row in found.filter(pa.array(labelled)).drop_columns(["status", "start"]).to_pylist():
        part = (row.get("track_start") or 0.0, row.get("track_end"))
        key = (row["track_id"], row["path"], *part)
        if key not in recordings:
            recordings[key] = len(made)
            values = {name: _as_text(row[name]) for name in conditions}
            location = storage.resolve(base, row["path"])
            made.append(Recording(row["path"], location, _as_text(row[column]), *part, conditions=values))
        of_row.append(recordings[key])
    stored = StoredEmbeddings(
        recording=np.array(of_row, np.int64),
        start=found["start"].to_numpy()[labelled],
        embedding=embedding[labelled],
        n_silent=int(unheard.sum()),
        n_errors=int(len(status) - len(ok) - unheard.sum()),
        metadata=metadata,
    )
    unlabelled = int((~labelled).sum())
    notes = [f"{unlabelled} crops without a singer are left out"] if unlabelled else []
    return LabelledData(path, made, stored, notes)
