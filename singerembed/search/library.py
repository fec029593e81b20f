"""Read finished outputs track by track, for an index."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from singerembed import storage
from singerembed.errors import InputError, OutputError, UsageError
from singerembed.output.finished import FinishedOutput, is_partitioned, track_bounds
from singerembed.output.schema import OK, RESERVED_COLUMNS, Counts
from singerembed.search.store import INDEX_COLUMNS


@dataclass(frozen=True)
class LibraryTrack:
    """The embedded crops of one track; at least one."""

    columns: dict[str, Any]  # track_id, path, and the catalogue's other columns
    crop: NDArray[np.int32]  # [n]
    start: NDArray[np.float64]  # [n], seconds
    end: NDArray[np.float64]  # [n], seconds
    rms_dbfs: NDArray[np.float32]  # [n]
    embedding: NDArray[np.float32]  # [n, dim]

    @property
    def key(self) -> tuple[str, str]:
        """What names a track in a library."""
        return self.columns["track_id"], self.columns["path"]

    @property
    def fingerprint(self) -> str:
        """Hash of the embeddings: two tracks with the same one are the same recording."""
        return hashlib.sha256(self.embedding.tobytes()).hexdigest()[:32]


class Library:
    """One or more finished outputs of one engine, read in order. Rows that are silent or errors are left out."""

    def __init__(self, outputs: list[str]) -> None:
        """Raises InputError where one is missing or not written by `run`, UsageError where one has another engine."""
        self.outputs = [output.rstrip("/") for output in outputs]
        found = [_facts(output) for output in self.outputs]
        self.engine: dict[str, Any] = found[0].metadata["engine"]
        self.spec: dict[str, Any] = found[0].metadata["spec"]
        self.separator: dict[str, Any] | None = found[0].metadata.get("separator")
        self.schema = found[0].schema
        for output, facts in zip(self.outputs, found, strict=True):
            check_engine(facts.metadata["engine"], self.engine, output, self.outputs[0])
            check_separator(facts.metadata.get("separator"), self.separator, output, self.outputs[0])
        self.n_silent = sum(facts.counts.silent + facts.counts.no_voice for facts in found)
        self.n_error_tracks = sum(facts.counts.error_tracks for facts in found)

    def tracks(self) -> Iterator[LibraryTrack]:
        """Read the tracks that have an embedding, one at a time; a work unit at a time is in memory.

        Raises InputError where an output cannot be read.
        """
        for rows in self._units():
            yield from _tracks_of(rows)

    def keys(self) -> set[tuple[str, str]]:
        """Return what names each track that has an embedding. Raises InputError where an output cannot be read."""
        found = set[tuple[str, str]]()
        for rows in self._units(["track_id", "path", "status"]):
            ok = rows.filter(pc.equal(rows["status"], OK))
            found.update(zip(ok["track_id"].to_pylist(), ok["path"].to_pylist(), strict=True))
        return found

    def _units(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Read `columns`, or all, of a work unit at a time."""
        for output in self.outputs:
            try:
                with closing(FinishedOutput(output, partitioned=is_partitioned(output))) as finished:
                    for unit in range(finished.n_units):
                        yield finished.rows(unit, columns)
            except (OSError, pa.ArrowException) as exc:
                raise InputError(f"cannot read {output}: {exc}. If it is damaged, make it again") from exc


def check_engine(found: dict[str, Any], wanted: dict[str, Any], what: str, of: str) -> None:
    """Raise UsageError if two engines differ: their embeddings cannot be compared."""
    if found["sha256"] != wanted["sha256"]:
        raise UsageError(
            f"{what} was made with the engine {found['name']} ({found['sha256'][:12]}...), {of} with "
            f"{wanted['name']} ({wanted['sha256'][:12]}...): their embeddings cannot be compared. "
            "Embed both with one engine"
        )


def check_separator(found: dict[str, Any] | None, wanted: dict[str, Any] | None, what: str, of: str) -> None:
    """Raise UsageError unless voices came out of mixes by one separator, or neither `what` nor `of` was separated."""
    if (found and found["sha256"]) != (wanted and wanted["sha256"]):
        raise UsageError(
            f"{what} holds {_voices(found)}, {of} {_voices(wanted)}: their embeddings cannot be compared. Embed both "
            "with the same --separate, or both without"
        )


def _voices(separator: dict[str, Any] | None) -> str:
    if separator is None:
        return "recordings as they are"
    return f"voices by the separator {separator['name']} ({separator['sha256'][:12]}...)"


def check_column(column: str, schema: pa.Schema, where: str) -> None:
    """Raise UsageError unless the catalogue's column `column` is in `schema`."""
    others = columns_of(schema).values()
    if column not in others:
        raise UsageError(
            f'{where} has no column "{column}"; it has: {", ".join(others) or "none of the catalogue"}. '
            "Name it with --singer-column"
        )


def columns_of(schema: pa.Schema) -> dict[str, str]:
    """The catalogue's columns in the `schema` of an output, and what an index calls each: some names are its own."""
    names = [name for name in schema.names if name not in RESERVED_COLUMNS]
    return {name: f"{name}_" if name.rstrip("_") in INDEX_COLUMNS else name for name in names}


class _Facts(NamedTuple):
    metadata: dict[str, Any]
    schema: pa.Schema
    counts: Counts


def _facts(output: str) -> _Facts:
    """What a finished output says of itself. Raises InputError."""
    if not storage.exists(output):
        raise InputError(f"{output}: no such file or folder. Make it with: singerembed run CATALOG {output}")
    try:
        opened = FinishedOutput(output, partitioned=is_partitioned(output))
    except OutputError as exc:
        raise InputError(
            f"{output} is not an output of run, or another program has rewritten it. Make one with: singerembed run "
            "CATALOG OUTPUT"
        ) from exc
    with closing(opened) as finished:
        return _Facts(finished.metadata, finished.schema, finished.counts)


def _tracks_of(rows: pa.Table) -> Iterator[LibraryTrack]:
    bounds = track_bounds(rows)
    ok = rows["status"].to_numpy() == OK
    others = columns_of(rows.schema)
    columns = rows.select(["track_id", "path", *others]).rename_columns(["track_id", "path", *others.values()])
    of_tracks = columns.take(pa.array(bounds[:-1], pa.int64())).to_pylist()
    stored = rows["embedding"].combine_chunks()
    flat = stored.values if hasattr(stored, "values") else stored.flatten()
    dim = stored.type.list_size
    embedding = np.asarray(flat, np.float32).reshape(-1, dim)[stored.offset : stored.offset + len(stored)]
    crop, start, end, rms = (rows[name].to_numpy() for name in ("crop", "start", "end", "rms_dbfs"))
    for i, values in enumerate(of_tracks):
        kept = np.arange(bounds[i], bounds[i + 1])[ok[bounds[i] : bounds[i + 1]]]
        kept = kept[np.isfinite(embedding[kept]).all(axis=1)]
        if len(kept):
            yield LibraryTrack(
                values,
                crop[kept].astype(np.int32),
                start[kept],
                end[kept],
                rms[kept].astype(np.float32),
                np.ascontiguousarray(embedding[kept]),
            )
