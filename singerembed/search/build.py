"""Make an index of finished outputs, or add them to one."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from singerembed import storage
from singerembed.errors import OutputError, UsageError
from singerembed.evaluation.pairs import unit_rows
from singerembed.evaluation.scoring import Moments, Scoring, fit_scoring, needs_second_moments
from singerembed.output.lock import take_lock
from singerembed.search.calibration import calibrate, draw_trials, singer_numbers, singer_sums
from singerembed.search.library import Library, LibraryTrack, check_column, check_engine
from singerembed.search.nearest import EXACT_ROWS, write_quantised
from singerembed.search.store import (
    FORMAT_VERSION,
    KINDS,
    MANIFEST,
    SCORING,
    StoredIndex,
    Vectors,
    publish_manifest,
    write_mapped_table,
)

INDEX_SCORINGS = ("centred", "cosine", "whitened")
_FLUSH_TRACKS = 4096
_CROPS = pa.schema([("track", pa.int64()), ("crop", pa.int32()), ("start", pa.float64()), ("end", pa.float64())])


@dataclass(frozen=True)
class IndexSummary:
    """What a call of `build_index` has done."""

    index: str
    added_tracks: int
    added_crops: int
    known: int  # tracks that the index had, unchanged
    replaced: int  # tracks whose recording has changed
    doubled: list[tuple[str, str]]  # paths of recordings that are there twice, and of their first copy; the first few
    n_doubled: int
    silent: int  # crops that were left out
    error_tracks: int
    singer_column: str | None
    n_tracks: int  # in the index now, each recording once
    n_crops: int


def build_index(
    outputs: list[str], path: str, *, singer_column: str | None = None, scoring: str | None = None,
    advance: Callable[[], object] = lambda: None,
) -> IndexSummary:  # fmt: skip
    """Index `outputs` as the folder `path`, or add to it what it does not have.

    `singer_column`: the catalogue's column of singers, fixed when the index is made (default: `singer`, if there is
    one). `scoring`: of INDEX_SCORINGS (default: centred); fitted when the index is made. `advance` is called after each
    track. An index is whole or not there, whenever this is killed. Raises UsageError and OutputError, the latter also
    while another process adds to the index.
    """
    library, target = Library(outputs), Path(path)
    if (target / MANIFEST).exists():
        with _locked(path):
            return _extend(library, StoredIndex(path), singer_column, scoring, advance)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{path} exists and is not an index. Give another name, or remove it")
    column = singer_column
    if column is None and "singer" in library.schema.names:
        column = "singer"
    if column is not None:
        check_column(column, library.schema, library.outputs[0])
    fitted = _fit(library, scoring or INDEX_SCORINGS[0])
    manifest = {
        "format": FORMAT_VERSION, "engine": library.engine, "spec": library.spec, "singer_column": column,
        "scoring": SCORING, "segments": [], "replaced": [], "quantised": {},
    }  # fmt: skip
    with _new_folder(target) as folder:
        arrays = {"kind": np.array(fitted.kind), "mean": fitted.mean}
        if fitted.projection is not None:
            arrays["projection"] = fitted.projection
        np.savez(folder / SCORING, **arrays)  # type: ignore[arg-type]
        writer = _Segment(folder, manifest, fitted, {}, {}, 0)
        summary = _add(library, writer, folder, manifest, advance)
    return replace(summary, index=path)  # its files were written under another name


def _fit(library: Library, kind: str) -> Scoring:
    moments = Moments(second=needs_second_moments(kind))
    for track in library.tracks():
        moments.add(track.embedding)
    if not moments.n:
        raise UsageError(
            f"{', '.join(library.outputs)}: no row has an embedding ({library.n_silent:,} silent crops, "
            f"{library.n_error_tracks:,} tracks with errors): there is nothing to index"
        )
    return fit_scoring(kind, moments)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Let nobody else add to the index for the block. Raises OutputError where somebody does, or it is read-only."""
    try:
        release = take_lock(path, path)
    except OSError as exc:
        raise _unwritable(path, exc) from exc
    try:
        yield
    finally:
        release()


def _unwritable(path: object, exc: OSError) -> OutputError:
    return OutputError(f"cannot write the index {path}: {exc.strerror or exc}")


def _extend(
    library: Library, index: StoredIndex, singer_column: str | None, scoring: str | None, advance: Callable[[], object]
) -> IndexSummary:
    path = str(index.folder)
    check_engine(library.engine, index.engine, library.outputs[0], path)
    for name, given, fixed in (
        ("--singer-column", singer_column, index.singer_column), ("--scoring", scoring, index.scoring.kind),
    ):  # fmt: skip
        if given not in {None, fixed}:
            raise UsageError(f"{path} was made with {name} {fixed}. Leave {name} out, or make another index")
    fingerprints = index.tracks["fingerprint"].to_pylist()
    keys = list(zip(index.tracks["track_id"].to_pylist(), index.tracks["path"].to_pylist(), strict=True))
    gone = set(index.manifest["replaced"])
    known = {key: (number, fingerprints[number]) for number, key in enumerate(keys) if number not in gone}
    first = {fingerprints[number]: number for number in np.flatnonzero(index.active).tolist()}
    manifest = json.loads(json.dumps(index.manifest))
    remove_leftovers(index)
    writer = _Segment(index.folder, manifest, index.scoring, known, first, len(keys))
    return _add(library, writer, index.folder, manifest, advance)


class _Segment:
    """Writes the files of one segment; what is known already is only counted."""

    def __init__(
        self, folder: Path, manifest: dict[str, Any], scoring: Scoring, known: dict[tuple[str, str], tuple[int, str]],
        first: dict[str, int], n_tracks: int,
    ) -> None:  # fmt: skip
        self.name = f"{manifest['generation'] + 1 if 'generation' in manifest else 0:06d}"
        self._folder, self._scoring, self._known, self._first = folder, scoring, known, first
        self._offset, self._rows = n_tracks, list[dict[str, Any]]()
        self._vectors, self._crops = list[Vectors](), list[pa.Table]()
        self._tables = list[pa.Table]()
        self.replaced, self.doubled = list[int](), list[tuple[str, str]]()
        self.n_known = self.n_doubled = self.n_tracks = self.n_crops = 0
        self._paths: dict[int, str] = {}

    def write(self, library: Library, advance: Callable[[], object]) -> None:
        """Write all tracks that are not known."""
        files = {kind: (self._folder / f"{self.name}.{kind}.f16").open("wb") for kind in KINDS}
        with contextlib.ExitStack() as stack:
            for file in files.values():
                stack.enter_context(file)
            for track in library.tracks():
                self._add(track, files)
                advance()
        self._flush()
        if self.n_tracks:
            tracks = pa.concat_tables(self._tables, promote_options="permissive")
            pq.write_table(tracks, self._folder / f"{self.name}.tracks.parquet", compression="zstd")
            crops = pa.concat_tables([_CROPS.empty_table(), *self._crops])
            for kind, table in (("tracks", tracks.drop_columns(["vector"])), ("crops", crops)):
                write_mapped_table(self._folder / f"{self.name}.{kind}.arrow", table)

    def _add(self, track: LibraryTrack, files: dict[str, Any]) -> None:
        fingerprint = track.fingerprint
        number = self._offset + self.n_tracks
        before = self._known.get(track.key)
        if before is not None:
            if before[1] == fingerprint and fingerprint in self._first:  # not a copy of what is replaced now
                self.n_known += 1
                return
            self.replaced.append(before[0])
            if self._first.get(before[1]) == before[0]:
                del self._first[before[1]]
        self._known[track.key] = (number, fingerprint)
        same_as = self._first.setdefault(fingerprint, number)
        self._paths[number] = track.key[1]
        if same_as != number:
            self.n_doubled += 1
            if len(self.doubled) < 5:
                self.doubled.append((track.key[1], self._paths.get(same_as, f"track {same_as}")))
        crops = self._scoring.vectors(track.embedding)
        whole = track_vector(crops)
        n = len(crops) if same_as == number else 0
        own = {"n_crops": n, "same_as": None if same_as == number else same_as, "fingerprint": fingerprint}
        self._rows.append({**track.columns, **own})
        self._vectors.append(whole)
        files["tracks"].write(whole.astype(np.float16).tobytes())
        if n:
            files["crops"].write(crops.astype(np.float16).tobytes())
            self._crops.append(
                pa.table(
                    {"track": pa.array(np.full(n, number)), "crop": track.crop, "start": track.start, "end": track.end}
                )
            )
        self.n_tracks, self.n_crops = self.n_tracks + 1, self.n_crops + n
        if len(self._rows) >= _FLUSH_TRACKS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            table = pa.Table.from_pylist(self._rows)
            same_as = table["same_as"].cast(pa.int64())
            table = table.set_column(table.schema.get_field_index("same_as"), "same_as", same_as)
            flat = pa.array(np.stack(self._vectors).astype(np.float16).ravel())
            vector = pa.FixedSizeListArray.from_arrays(flat, self._scoring.dim)
            self._tables.append(table.append_column("vector", vector))
            self._rows, self._vectors = [], []
            self._crops = [pa.concat_tables(self._crops).combine_chunks()] if self._crops else []


def track_vector(crops: Vectors) -> Vectors:
    """Return the vector of a track, [dim]: the mean of its crops' vectors [n, dim], scaled to length 1."""
    return np.asarray(unit_rows(crops.mean(axis=0, keepdims=True))[0])


def _add(
    library: Library, segment: _Segment, folder: Path, manifest: dict[str, Any], advance: Callable[[], object]
) -> IndexSummary:
    """Write a segment and all that depends on it into `folder`, the manifest last."""
    try:
        segment.write(library, advance)
        if segment.n_tracks:
            manifest["generation"] = int(segment.name)
            manifest["segments"].append(segment.name)
            manifest["replaced"] += segment.replaced
            _describe(folder, manifest, segment.name)
            publish_manifest(folder, manifest)
        else:
            for path in folder.glob(f"{segment.name}.*"):
                path.unlink()
    except OSError as exc:
        raise _unwritable(folder, exc) from exc
    index = StoredIndex(str(folder))
    remove_leftovers(index)
    n_crops = int(index.tracks["n_crops"].to_numpy()[index.active].sum())
    return IndexSummary(
        str(folder), segment.n_tracks, segment.n_crops, segment.n_known, len(segment.replaced), segment.doubled,
        segment.n_doubled, library.n_silent, library.n_error_tracks, index.singer_column, int(index.active.sum()),
        n_crops,
    )  # fmt: skip


def _describe(folder: Path, manifest: dict[str, Any], name: str) -> None:
    """Write what is computed over all segments: quantised vectors, singers, calibration."""
    index = _OpenedDraft(folder, manifest)
    for kind, vectors in index.vectors.items():
        if len(vectors) > EXACT_ROWS:
            before = manifest["quantised"].get(kind)
            write_quantised(folder / f"{name}.{kind}.faiss", vectors, folder / before if before else None)
            manifest["quantised"][kind] = f"{name}.{kind}.faiss"
    if index.singer_column is not None:
        names, singer = singer_numbers(index.singers)
        singer = np.where(index.active, singer, -1)
        of_tracks = index.vectors["tracks"].take(np.arange(index.tracks.num_rows))
        total = singer_sums(of_tracks, singer, len(names))
        counts = np.bincount(singer[singer >= 0], minlength=len(names))
        length = np.linalg.norm(total, axis=1)
        np.savez(folder / f"{name}.singers.npz", names=np.array(names), n_tracks=counts, length=length)
        np.save(folder / f"{name}.singers.npy", total)
        manifest["singers"] = f"{name}.singers"
        fitted = calibrate(draw_trials(of_tracks, singer, total)) if (counts > 1).any() else None
        manifest["calibration"] = fitted.to_dict() if fitted else None


class _OpenedDraft(StoredIndex):
    """An index whose manifest is not written yet."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self._open()


def remove_leftovers(index: StoredIndex) -> None:
    """Remove files in the index's folder that a killed call, or an older state of it, has left."""
    wanted = {MANIFEST, index.manifest["scoring"], *index.manifest["quantised"].values()}
    wanted |= {f"{index.manifest.get('singers')}.{end}" for end in ("npy", "npz")}
    wanted |= {
        f"{n}.{kind}.{end}" for n in index.manifest["segments"] for kind in KINDS for end in ("arrow", "f16", "parquet")
    }
    for path in index.folder.iterdir():
        is_ours = path.name[:6].isdecimal() or (path.name.startswith(f".{MANIFEST}.") and path.suffix == ".tmp")
        if path.name not in wanted and is_ours and path.is_file():
            path.unlink()


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name when the block ends well; otherwise nothing is left."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        folder = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
        folder.mkdir()
    except OSError as exc:
        raise _unwritable(target, exc) from exc
    try:
        yield folder
        storage.remove_empty_folder(str(target))
        try:
            folder.rename(target)
        except OSError as exc:  # as when another process has made it meanwhile
            raise _unwritable(target, exc) from exc
    finally:
        storage.remove_folder(str(folder))


def _remove_abandoned(target: Path) -> None:
    """Remove the folders that killed processes of this machine have left beside `target`."""
    for folder in target.parent.glob(f".{glob.escape(target.name)}.*-*.tmp"):
        process = folder.name[len(target.name) + 2 :].partition("-")[0]
        if process.isdecimal() and not Path("/proc", process).exists() and Path("/proc/self").exists():
            storage.remove_folder(str(folder))


@contextlib.contextmanager
def index_of(
    source: str, singer_column: str | None = None, advance: Callable[[], object] = lambda: None
) -> Iterator[StoredIndex]:
    """The index `source`, or one made of the output `source` and removed afterwards. Raises UsageError, OutputError."""
    if (Path(source) / MANIFEST).exists():
        yield StoredIndex(source)
        return
    with tempfile.TemporaryDirectory(prefix="singerembed-") as folder:
        path = str(Path(folder) / "index")
        build_index([source], path, singer_column=singer_column, advance=advance)
        yield StoredIndex(path)
