"""Make an index of finished outputs, or add them to one."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from singerembed import storage
from singerembed.errors import InputError, OutputError, UsageError
from singerembed.evaluation.scoring import Moments, Scoring, fit_scoring, needs_second_moments
from singerembed.output.lock import take_lock
from singerembed.search.calibration import calibrate, draw_trials, singer_numbers, singer_sums
from singerembed.search.library import Library, check_column, check_engine, check_separator
from singerembed.search.nearest import EXACT_ROWS, write_quantised
from singerembed.search.segment import CROP_COLUMNS, Segment, TrackRow
from singerembed.search.store import (
    FORMAT_VERSION,
    INDEX_COLUMNS,
    KINDS,
    MANIFEST,
    SCORING,
    StoredIndex,
    publish_manifest,
    singer_name,
)

INDEX_SCORINGS = ("centred", "cosine", "whitened")
_MANY_GONE = 0.5  # share of an index's tracks that an update does not take out without being told
_OWN_FILES = re.compile(
    rf"\d{{6}}\.(({'|'.join(KINDS)})\.(arrow|f16|parquet|faiss)|singers\.np[yz])|\.{re.escape(MANIFEST)}\..*\.tmp"
)


@dataclass(frozen=True)
class IndexSummary:
    """What a call of `build_index` has done."""

    index: str
    added_tracks: int
    added_crops: int
    known: int  # tracks that the index had, unchanged
    replaced: int  # tracks whose recording or singer has changed
    gone: int  # tracks that an update took out
    doubled: list[tuple[str, str]]  # paths of recordings that are there twice, and of their first copy; the first few
    n_doubled: int
    silent: int  # crops that were left out
    error_tracks: int
    singer_column: str | None
    n_tracks: int  # in the index now, each recording once
    n_crops: int


def build_index(
    outputs: list[str], path: str, *, singer_column: str | None = None, scoring: str | None = None,
    update: bool = False, allow_gone: bool = False, advance: Callable[[], object] = lambda: None,
) -> IndexSummary:  # fmt: skip
    """Index `outputs` as the folder `path`, or add to it what it does not have.

    `singer_column`: the catalogue's column of singers, fixed when the index is made (default: `singer`, if there is
    one). `scoring`: of INDEX_SCORINGS (default: centred); fitted when the index is made. `update`: tracks that
    `outputs` do not have, or not with an embedding, are taken out of the index, more than half of them only with
    `allow_gone`. `advance` is called after each track. An index is whole or not there, whenever this is killed. Raises
    InputError, UsageError, and OutputError, the latter also while another process adds to the index.
    """
    if storage.is_remote(path):
        raise UsageError(f"{path}: an index is mapped into memory from a local disk. Make it there, and copy it")
    library, target = Library(outputs), Path(path)
    if (target / MANIFEST).exists():
        with storage.writing(f"the index {path}"), _locked(path):
            index = StoredIndex(path)
            _check_fixed(library, index, singer_column, scoring)
            changes = _Changes(index)
            if update:
                changes.take_out(library, allow_gone=allow_gone)
            remove_leftovers(index)
            manifest = json.loads(json.dumps(index.manifest))
            return _add(library, index.scoring, index, index.folder, manifest, changes, advance)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{path} exists and is not an index. Give another name, or remove it")
    column = singer_column
    if column is None and "singer" in library.schema.names:
        column = "singer"
    if column is not None:
        check_column(column, library.schema, library.outputs[0])
    fitted = _fit(library, scoring or INDEX_SCORINGS[0])
    manifest = {
        "format": FORMAT_VERSION, "engine": library.engine, "separator": library.separator, "spec": library.spec,
        "singer_column": column, "scoring": SCORING, "segments": [], "replaced": [], "quantised": {},
    }  # fmt: skip
    with storage.writing(f"the index {path}"), _new_folder(target) as folder:
        arrays = {"kind": np.array(fitted.kind), "mean": fitted.mean}
        if fitted.projection is not None:
            arrays["projection"] = fitted.projection
        np.savez(folder / SCORING, **arrays)  # type: ignore[arg-type]
        summary = _add(library, fitted, None, folder, manifest, _Changes(None), advance)
    return replace(summary, index=path)  # its files were written under another name


def _fit(library: Library, kind: str) -> Scoring:
    moments = Moments(second=needs_second_moments(kind))
    for track in library.tracks():
        moments.add(track.embedding)
    if not moments.n:
        raise InputError(
            f"{', '.join(library.outputs)}: no row has an embedding ({library.n_silent:,} silent crops, "
            f"{library.n_error_tracks:,} tracks with errors): there is nothing to index"
        )
    return fit_scoring(kind, moments)


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Let nobody else add to the index for the block. Raises OutputError where somebody does."""
    release = take_lock(path, path)
    try:
        yield
    finally:
        release()


def _check_fixed(library: Library, index: StoredIndex, singer_column: str | None, scoring: str | None) -> None:
    """Raise UsageError where `library` or an option is at odds with what was fixed when `index` was made."""
    path = str(index.folder)
    check_engine(library.engine, index.engine, library.outputs[0], path)
    check_separator(library.separator, index.separator, library.outputs[0], path)
    for name, given, fixed in (
        ("--singer-column", singer_column, index.singer_column), ("--scoring", scoring, index.scoring.kind),
    ):  # fmt: skip
        if given not in {None, fixed}:
            raise UsageError(f"{path} was made with {name} {fixed}. Leave {name} out, or make another index")


class _Changes:
    """The tracks of a library that an index does not have as they are."""

    def __init__(self, index: StoredIndex | None) -> None:
        # Tracks that do not count any more: `rows` adds those that it replaces.
        self.gone = set[int](index.manifest["replaced"] if index else [])
        self.n_known = self.n_replaced = self.n_gone = 0
        self._known = dict[tuple[str, str], tuple[int, str, str]]()  # number, fingerprint, singer
        self._n_tracks = index.tracks.num_rows if index else 0
        if index:
            columns = [index.tracks[name].to_pylist() for name in ("track_id", "path", "fingerprint")]
            for number, (name, path, *facts) in enumerate(zip(*columns, index.singers, strict=True)):
                if number not in self.gone:
                    self._known[name, path] = number, *facts

    def take_out(self, library: Library, *, allow_gone: bool) -> None:
        """Count the tracks as gone that `library` does not have.

        Raises OutputError where they are more than half, and that was not allowed.
        """
        missing = self._known.keys() - library.keys()
        if len(missing) > _MANY_GONE * len(self._known) and not allow_gone:
            raise OutputError(
                f"{len(missing):,} of the {len(self._known):,} tracks of the index are not in "
                f"{', '.join(library.outputs)}: are these all its outputs? --allow-gone takes them out"
            )
        self.n_gone = len(missing)
        self.gone.update(self._known.pop(key)[0] for key in missing)

    def rows(
        self, library: Library, singer_column: str | None, scoring: Scoring, advance: Callable[[], object]
    ) -> Iterator[TrackRow]:
        """Yield the new and the changed tracks, in order: of another recording, or by another singer."""
        for track in library.tracks():
            fingerprint = track.fingerprint
            before = self._known.get(track.key)
            singer = singer_name(track.columns.get(singer_column or ""))
            if before is not None and singer_column not in track.columns:
                singer = before[2]
            if before is not None and before[1:] == (fingerprint, singer):
                self.n_known += 1
            else:
                if before is not None:
                    self.n_replaced += 1
                    self.gone.add(before[0])
                self._known[track.key] = self._n_tracks, fingerprint, singer
                self._n_tracks += 1
                crops = {name: getattr(track, name) for name in CROP_COLUMNS}
                yield TrackRow(track.columns, fingerprint, crops, scoring.vectors(track.embedding))
            advance()


def _rows_of(index: StoredIndex, numbers: NDArray[np.int64]) -> Iterator[TrackRow]:
    """Yield tracks of `index`, also copies, whose crops are those of a track with the same fingerprint."""
    tracks = index.tracks
    prints = tracks["fingerprint"].take(pa.array(numbers)).combine_chunks()
    with_crops = pc.and_(pc.greater(tracks["n_crops"], 0), pc.is_in(tracks["fingerprint"], prints))
    stored = np.flatnonzero(with_crops.to_numpy())
    of_print = dict(zip(tracks["fingerprint"].take(pa.array(stored)).to_pylist(), stored.tolist(), strict=True))
    for number, fingerprint in zip(numbers.tolist(), prints.to_pylist(), strict=True):
        part = index.crops_of(of_print[fingerprint])
        table = index.crops.slice(part.start, part.stop - part.start)
        row = tracks.slice(number, 1).to_pylist()[0]
        columns = {name: value for name, value in row.items() if name not in INDEX_COLUMNS}
        crops = {name: table[name].to_numpy() for name in CROP_COLUMNS}
        yield TrackRow(columns, fingerprint, crops, index.vectors["crops"].take(np.arange(part.start, part.stop)))


def _add(
    library: Library, scoring: Scoring, index: StoredIndex | None, folder: Path, manifest: dict[str, Any],
    changes: _Changes, advance: Callable[[], object],
) -> IndexSummary:  # fmt: skip
    """Write what `library` changes in `index`, and all that depends on it, into `folder`, the manifest last."""
    generation = manifest.get("generation", -1) + 1
    segment = Segment(folder, f"{generation:06d}", scoring.dim, index, changes.gone)
    segment.write(changes.rows(library, manifest["singer_column"], scoring, advance))
    changed = segment.n_tracks or changes.n_gone
    if changed:
        added = [segment.name] if segment.n_tracks else []
        manifest.update(generation=generation, segments=[*manifest["segments"], *added])
        manifest["replaced"] = sorted(changes.gone)
        _keep_copies(folder, manifest, changes.gone)
        _describe(folder, manifest, f"{manifest['generation']:06d}")
        publish_manifest(folder, manifest)
    found = StoredIndex(str(folder))
    if not changed:
        remove_leftovers(found)
    n_crops = found.tracks["n_crops"].to_numpy()
    new = np.arange(len(n_crops))[segment.offset : segment.offset + segment.n_tracks]
    return IndexSummary(
        index=str(folder), added_tracks=len(new), added_crops=int(n_crops[new][found.active[new]].sum()),
        known=changes.n_known, replaced=changes.n_replaced, gone=changes.n_gone, doubled=segment.doubled,
        n_doubled=segment.n_doubled, silent=library.n_silent, error_tracks=library.n_error_tracks,
        singer_column=found.singer_column, n_tracks=int(found.active.sum()), n_crops=int(n_crops[found.active].sum()),
    )  # fmt: skip


def _keep_copies(folder: Path, manifest: dict[str, Any], gone: set[int]) -> None:
    """Write the copies of tracks that are `gone` anew, as recordings of their own: a segment more in `manifest`."""
    index = _OpenedDraft(folder, manifest)
    same_as = index.tracks["same_as"].fill_null(-1).to_numpy()
    left = np.array(sorted(set(np.flatnonzero(np.isin(same_as, list(gone))).tolist()) - gone), np.int64)
    if len(left):
        gone = gone | set(left.tolist())
        generation = manifest["generation"] + 1
        segment = Segment(folder, f"{generation:06d}", index.scoring.dim, index, gone)
        segment.write(_rows_of(index, left))
        manifest.update(generation=generation, segments=[*manifest["segments"], segment.name], replaced=sorted(gone))


def _describe(folder: Path, manifest: dict[str, Any], name: str) -> None:
    """Write what is computed over all segments: quantised vectors, singers, calibration."""
    index = _OpenedDraft(folder, manifest)
    for kind, vectors in index.vectors.items():
        if len(vectors) > EXACT_ROWS:
            before = manifest["quantised"].get(kind)
            write_quantised(folder / f"{name}.{kind}.faiss", vectors, folder / before if before else None)
            manifest["quantised"][kind] = f"{name}.{kind}.faiss"
    if index.singer_column is not None:
        active = index.active.tolist()  # a singer whose tracks were all replaced is none
        names, singer = singer_numbers([name if own else "" for name, own in zip(index.singers, active, strict=True)])
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
    """Remove files in the index's folder that a killed call, or an older state of it, has left.

    Those of the state before this one stay until the next call: somebody may have read its manifest, and open them yet.
    """
    wanted = {MANIFEST, index.manifest["scoring"], *index.manifest["quantised"].values()}
    wanted |= {f"{index.manifest.get('singers')}.{end}" for end in ("npy", "npz")}
    wanted |= {
        f"{n}.{kind}.{end}" for n in index.manifest["segments"] for kind in KINDS for end in ("arrow", "f16", "parquet")
    }
    for path in index.folder.iterdir():
        if path.name not in wanted and _OWN_FILES.fullmatch(path.name):
            path.unlink()


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its name when the block ends well; otherwise nothing is left."""
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(target)
    folder = target.with_name(f".{target.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    folder.mkdir()
    try:
        yield folder
        storage.remove_empty_folder(str(target))
        folder.rename(target)  # fails where another process has made it meanwhile
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
    """The index `source`, or one made of the output `source` and removed afterwards. Raises as build_index."""
    if (Path(source) / MANIFEST).exists():
        yield StoredIndex(source)
        return
    with tempfile.TemporaryDirectory(prefix="singerembed-") as folder:
        path = str(Path(folder) / "index")
        build_index([source], path, singer_column=singer_column, advance=advance)
        yield StoredIndex(path)
