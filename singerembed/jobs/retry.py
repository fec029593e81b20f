"""Embed again what failed in a finished output."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np
import pyarrow as pa

from singerembed.catalog.identity import NONE, matches
from singerembed.catalog.read import Track
from singerembed.jobs.todays_tracks import TodaysTracks
from singerembed.jobs.units import Listener, RevisedUnit, Work
from singerembed.jobs.update import track_keys
from singerembed.output.known_tracks import KnownTracks
from singerembed.output.schema import RESERVED_COLUMNS, conformed


class FailedTracks:
    """The tracks of a finished output that have a row in error, and are in the catalogue.

    An output that was updated has them in another order than the catalogue, so they are found by what names them.
    """

    def __init__(self, known: KnownTracks, today: TodaysTracks, schema: pa.Schema) -> None:
        """`schema`: of the output."""
        self._known, self._today = known, today
        self._extra = pa.schema([field for field in schema if field.name not in RESERVED_COLUMNS])
        self._today_of = matches(track_keys(known.rows), track_keys(today.rows))
        failed = np.asarray(known.rows.column("error_code").is_valid().to_numpy(), np.bool_)
        self._embed = failed & (self._today_of != NONE)

    def __len__(self) -> int:
        return int(self._embed.sum())

    def work(self, done: Container[int], listeners: Sequence[Listener]) -> Work:
        """Yield the units that hold some of them and are not `done`, and which; `listeners` hear of the others."""
        for unit, tracks, bounds in self._known.units():
            positions = np.flatnonzero(self._embed[tracks])
            if unit in done:
                for listener in listeners:
                    listener.skipped(len(positions))
            elif len(positions):
                rows = self._known.rows.take(tracks)
                names = rows.select(["track_id", "path"]).to_pylist()
                of_unit = [Track(0, one["track_id"], one["path"], "") for one in names]
                for i, track in zip(positions, self._today.tracks(self._today_of[tracks[positions]]), strict=True):
                    of_unit[i] = track
                yield RevisedUnit(unit, of_unit, conformed(rows, self._extra), bounds), positions.tolist()
