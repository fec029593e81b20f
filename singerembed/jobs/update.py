"""Bring a finished output up to date with today's catalogue: what keeps its rows, what is embedded, what goes.

A unit of the output is written again where one of its tracks was changed, has gone, or has other values in columns that
are passed through; other units are left as they are. New tracks fill up the last unit, and make units behind it.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from singerembed.catalog.identity import NONE, keys, matches
from singerembed.catalog.read import Track, cut_units
from singerembed.catalog.row_file import RowFile
from singerembed.errors import OutputError
from singerembed.jobs.options import RunOptions
from singerembed.jobs.todays_tracks import PROBLEM, TodaysTracks
from singerembed.jobs.units import RevisedUnit, Work
from singerembed.output.finished import FinishedOutput
from singerembed.output.known_tracks import KnownTracks
from singerembed.output.parts import PartStore, differences
from singerembed.output.schema import IDENTITY, PACKET_HASH, RESERVED_COLUMNS, conformed

# Error codes that another night may mend although the file stays as it is.
_PASSING = {"unreadable", "decode_timeout", "internal"}
# Options that may change from one night to the next: they decide no embedding.
_FREE_OPTIONS = {"columns", "unit_minutes"}
_MANY_GONE = 0.5
_BATCH = 65_536  # tracks that are compared at a time
_FROM_THE_CATALOG = ["track_id", "path", *(field.name for field in IDENTITY)]


@dataclass
class UpdateCounts:
    """What an update does, in tracks."""

    kept: int = 0
    new: int = 0
    changed: int = 0
    moved: int = 0  # kept, found at another path by its audio
    retagged: int = 0  # kept, the file changed and its audio did not
    retried: int = 0  # in error before, of a kind that may pass
    gone: int = 0
    gone_kept: int = 0  # by --keep-missing, or because a folder could not be read
    missing: int = 0  # kept: in the catalogue, and the file is not there today

    def to_dict(self) -> dict[str, int]:
        """The counts as JSON types."""
        return asdict(self)

    def __str__(self) -> str:
        counts = self.to_dict()
        named = ((name.replace("_", " "), count) for name, count in counts.items() if name != "kept" and count)
        others = " · ".join(f"{name} {count:,}" for name, count in named)
        return f"{self.kept:,} tracks" + (f" · {others}" if others else ", and nothing is new")


def embedding_identity(identity: dict[str, Any]) -> dict[str, Any]:
    """What of a run's identity decides its embeddings."""
    options = {name: value for name, value in identity["options"].items() if name not in _FREE_OPTIONS}
    options["vocals_column"] = identity["options"]["columns"].get("vocals")
    return {"engine": identity["engine"], "separator": identity.get("separator"), "options": options}


def take_in_interrupted(
    parts: PartStore, previous: FinishedOutput, identity: dict[str, Any], facts: dict[str, Any]
) -> bool:
    """Put into the output what an interrupted run has embedded, and say whether there is an output then.

    `identity`: of today's run; `facts`: what else the output's metadata holds. Raises OutputError where the output or
    the parts have other embeddings than today's run.
    """
    if previous.exists:
        _check(previous.metadata, identity, parts.output)
        if "file_mtime" not in previous.schema.names:
            raise OutputError(
                f"{parts.output} does not note sizes and times of files: an earlier version wrote it. Give another "
                "output, or --restart to embed everything again"
            )
    begun = parts.identity()
    if begun is not None:
        _check(begun, identity, parts.folder)
        if previous.exists:
            parts.stage()
        else:
            parts.refresh()
        taken = bool(parts.done)
        take_in(parts, begun, facts, previous if previous.exists else None)
        return previous.exists or taken
    return previous.exists


def take_in(parts: PartStore, identity: dict[str, Any], facts: dict[str, Any], previous: FinishedOutput | None) -> None:
    """Put the units that are done into the output; `identity` is that of the run that made them."""
    which = identity.get("update") or hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    part_of = {**identity["catalog"], "sha256": None}  # so that a run of the whole catalogue does not take it for done
    parts.take_in({**identity, **facts, "update": which, "catalog": part_of}, previous)


def _check(before: dict[str, Any], identity: dict[str, Any], what: str) -> None:
    different = differences(embedding_identity(before), embedding_identity(identity))
    if different:
        raise OutputError(
            f"{what} has other embeddings: {', '.join(different)}. Give another output, or --restart to embed "
            "everything again"
        )


def new_update() -> dict[str, str]:
    """What tells one update from all others, in its parts and its output."""
    return {"update": uuid.uuid4().hex}


class UpdatePlan:
    """Which tracks of a finished output keep their rows, and what is to be embedded."""

    def __init__(
        self,
        known: KnownTracks,
        today: TodaysTracks,
        schema: pa.Schema,
        options: RunOptions,
        *,
        all_was_seen: bool,
    ) -> None:
        """Compare; `schema` is today's output's. `all_was_seen`: no folder was left out that could not be read.

        Raises OutputError where more than half of the tracks have gone, and that was not allowed; and Stopped.
        """
        self._known, self._today, self._schema, self._options = known, today, schema, options
        self._extra = [name for name in schema.names if name not in RESERVED_COLUMNS]
        self.counts = UpdateCounts()
        self._today_of = matches(track_keys(known.rows), track_keys(today.rows))
        self._embed = np.zeros(len(known), np.bool_)
        self._missing = np.zeros(len(known), np.bool_)
        self._compare_files()
        self._find_by_audio()
        self._is_new = np.ones(len(today), np.bool_)
        self._is_new[self._today_of[self._today_of != NONE]] = False
        gone = int((self._today_of == NONE).sum())
        keep = options.keep_missing or not all_was_seen
        if not keep and gone > _MANY_GONE * len(known) and not options.allow_gone:
            raise OutputError(
                f"{gone:,} of the {len(known):,} recordings of the output have gone from the catalogue: is a disk not "
                "mounted? --allow-gone drops their rows, --keep-missing keeps them"
            )
        self._stays = (self._today_of != NONE) | keep
        self.counts.gone, self.counts.gone_kept = (0, gone) if keep else (gone, 0)
        self.counts.new = int(self._is_new.sum())
        self.counts.kept = int((self._stays & ~self._embed).sum())
        self._rewrite = ~self._stays | self._embed | self._stale()

    @property
    def n_to_embed(self) -> int:
        """How many tracks are embedded."""
        return int(self._embed.sum()) + self.counts.new

    @property
    def is_empty(self) -> bool:
        """Whether the output is up to date."""
        return not self._rewrite.any() and not self.counts.new and not self._known.odd_units

    def rewritten(self) -> Iterator[RevisedUnit]:
        """Yield the units that are written again and in which nothing is embedded."""
        for unit, tracks, bounds in self._known.units():
            touched = self._rewrite[tracks].any() or unit in self._known.odd_units
            if touched and not self._embed[tracks].any() and unit != self._filled_up:
                yield self._revised(unit, tracks, bounds, tracks[:0])[0]

    def work(self) -> Work:
        """Yield the units in which tracks are embedded, and which."""
        fresh = np.flatnonzero(self._is_new)
        for unit, tracks, bounds in self._known.units():
            added: NDArray[np.int64] = fresh[:0]
            if unit == self._filled_up:
                room = self._options.unit_minutes - self._minutes(tracks)
                more = np.cumsum([track.minutes for track in self._today.tracks(fresh[:_BATCH])])
                added = fresh[: int(np.searchsorted(more, room)) + 1]
                fresh = fresh[len(added) :]
            if len(added) or self._embed[tracks].any():
                yield self._revised(unit, tracks, bounds, added)
        batches = (fresh[i : i + _BATCH] for i in range(0, len(fresh), _BATCH))
        new = ((self._today.tracks(rows), self._today.extra(rows)) for rows in batches)
        for one in cut_units(new, self._options.unit_minutes, self._known.n_units):
            yield one, range(len(one.tracks))

    # --- comparing --------------------------------------------------------------------------------------------------

    def _compare_files(self) -> None:
        """Tell what was changed, is not there, or failed and is tried again, of the tracks in both."""
        here = np.flatnonzero(self._today_of != NONE)
        known, today = self._known.rows, self._today.rows
        for first in range(0, len(here), _BATCH):
            tracks = here[first : first + _BATCH]
            old, new = known.take(tracks), today.take(self._today_of[tracks])
            same = ~(_differ(old["file_size"], new["file_size"]) | _differ(old["file_mtime"], new["file_mtime"]))
            absent = _is_null(new["file_size"]) & _is_null(new["file_mtime"])
            missing = ~same & absent & _is_null(new[PROBLEM])
            is_bad_row = _equal_to(old["error_code"], ["bad_row"])
            mended = is_bad_row != ~_is_null(new[PROBLEM])
            mended |= is_bad_row & _differ(old["error"], new[PROBLEM])
            retried = same & ~absent & _equal_to(old["error_code"], sorted(_PASSING))
            changed = (~same & ~missing) | mended
            self.counts.changed += int(changed.sum())
            self.counts.retried += int((retried & ~changed).sum())
            self.counts.missing += int((missing & ~mended).sum())
            self._embed[tracks] = changed | retried
            self._missing[tracks] = missing & ~mended

    def _find_by_audio(self) -> None:
        """Tell what was only retagged or moved, by the hash of the packets, where the output has it."""
        if self._options.identity != "audio":
            return
        hashes = np.array(self._known.rows.column(PACKET_HASH.name).to_pylist(), object)
        # An error may have come of the file's header, which is not of its audio, or of its storage.
        known = np.array([value is not None for value in hashes], np.bool_)
        known &= _is_null(self._known.rows.column("error_code"))
        changed = np.flatnonzero(self._embed & known)
        for track, found in zip(changed, self._today.packet_hashes(self._today_of[changed]), strict=True):
            if found == hashes[track]:
                self._embed[track] = False
                self.counts.changed -= 1
                self.counts.retagged += 1
        gone = np.flatnonzero((self._today_of == NONE) & known)
        fresh = np.setdiff1d(np.arange(len(self._today)), self._today_of)
        if not len(gone) or not len(fresh):
            return
        of_fresh = self._today.packet_hashes(fresh)
        fresh = fresh[[value is not None for value in of_fresh]]
        old, new = self._known.rows.take(gone), self._today.rows.take(fresh)
        of_new = pa.array([value for value in of_fresh if value is not None], pa.string())
        moved = matches(
            keys(pa.array(hashes[gone], pa.string()), old["track_start"], old["track_end"]),
            keys(of_new, new["track_start"], new["track_end"]),
        )
        self._today_of[gone[moved != NONE]] = fresh[moved[moved != NONE]]
        self.counts.moved = int((moved != NONE).sum())

    def _stale(self) -> NDArray[np.bool_]:
        """Which tracks that keep their rows have other values in columns from the catalogue, or other columns."""
        if self._known.rows.schema.names != [name for name in self._schema.names if name != "embedding"] or any(
            field.type != self._schema.field(field.name).type for field in self._known.rows.schema
        ):
            return np.ones(len(self._known), np.bool_)
        stale = np.zeros(len(self._known), np.bool_)
        here = np.flatnonzero(self._today_of != NONE)
        for first in range(0, len(here), _BATCH):
            tracks = here[first : first + _BATCH]
            old, new = self._known.rows.take(tracks), self._columns(tracks)
            for name in new.column_names:
                stale[tracks] |= _differ(old[name], new[name])
        return stale

    # --- units ------------------------------------------------------------------------------------------------------

    @cached_property
    def _filled_up(self) -> int:
        """The unit that new tracks are added to: the last one, where there is room in it; or NONE."""
        if not self.counts.new or not self._known.n_units:
            return NONE
        unit, tracks = self._known.last_unit()
        return unit if self._minutes(tracks) < self._options.unit_minutes else NONE

    def _minutes(self, tracks: NDArray[np.int64]) -> float:
        rows = self._today_of[tracks[self._stays[tracks]]]
        return sum(track.minutes for track in self._today.tracks(rows[rows != NONE]))

    def _revised(
        self, unit: int, tracks: NDArray[np.int64], bounds: Sequence[tuple[int, int]], added: NDArray[np.int64]
    ) -> tuple[RevisedUnit, list[int]]:
        """The unit without what has gone and with the rows `added` of today's catalogue, and what is embedded of it."""
        stays = self._stays[tracks]
        tracks = tracks[stays]
        kept_bounds = [bound for bound, stay in zip(bounds, stays, strict=True) if stay]
        columns = self._columns(tracks)
        names = columns.select(["track_id", "path"]).to_pylist()
        of_unit = [Track(0, one["track_id"], one["path"], "") for one in names]
        embedded = np.flatnonzero(self._embed[tracks])
        for i, track in zip(embedded, self._today.tracks(self._today_of[tracks[embedded]]), strict=True):
            of_unit[i] = track
        positions = [*embedded.tolist(), *range(len(tracks), len(tracks) + len(added))]
        extra = columns.select(self._extra)
        if len(added):
            extra = pa.concat_tables([extra, self._today.extra(added)])
        revised = RevisedUnit(
            unit,
            [*of_unit, *self._today.tracks(added)],
            extra,
            bounds=[*kept_bounds, *[(0, 0)] * len(added)],
            columns=columns,
        )
        return revised, positions

    def _columns(self, tracks: NDArray[np.int64]) -> pa.Table:
        """The values of columns from the catalogue as `tracks` are to have them, a row a track."""
        today_of = self._today_of[tracks]
        here = today_of != NONE
        schema = pa.schema([self._schema.field(name) for name in (*_FROM_THE_CATALOG, *self._extra)])
        rows = today_of[here]
        new = self._today.rows.take(rows)
        new = pa.table([new[name] for name in schema.names], schema=schema)
        old = conformed(self._known.rows.take(tracks), schema)
        # Row i of `both` is the new value of the i-th track that is here, then the old values of all.
        both = pa.concat_tables([new, old])
        source = np.arange(len(tracks)) + len(rows)
        source[here] = np.arange(len(rows))
        table = both.take(pa.array(source))
        facts = source.copy()
        missing = self._missing[tracks]
        facts[missing] = np.flatnonzero(missing) + len(rows)
        for name in ("file_size", "file_mtime"):
            column = both[name].take(pa.array(facts))
            table = table.set_column(table.column_names.index(name), schema.field(name), column)
        return table


def track_keys(rows: RowFile) -> pa.Array:
    """What names each track of an output, or of a catalogue: its path, start and end."""
    return keys(rows.column("path"), rows.column("track_start"), rows.column("track_end"))


def _is_null(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    return np.asarray(column.is_null().to_numpy(), np.bool_)


def _equal_to(column: pa.ChunkedArray, values: list[str]) -> NDArray[np.bool_]:
    return np.asarray(pc.is_in(column, pa.array(values, column.type)).to_numpy(), np.bool_)


def _differ(old: pa.ChunkedArray, new: pa.ChunkedArray) -> NDArray[np.bool_]:
    """Where two columns of one type differ; null equals null, and NaN equals NaN."""
    try:
        equal = np.asarray(pc.fill_null(pc.equal(old, new), False).to_numpy(), np.bool_)
    except pa.ArrowNotImplementedError:  # lists and structs
        return np.array([a != b for a, b in zip(old.to_pylist(), new.to_pylist(), strict=True)], np.bool_)
    equal |= _is_null(old) & _is_null(new)
    if pa.types.is_floating(old.type):
        equal |= np.asarray(pc.fill_null(pc.and_(pc.is_nan(old), pc.is_nan(new)), False).to_numpy(), np.bool_)
    return ~equal
