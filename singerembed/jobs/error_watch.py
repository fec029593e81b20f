"""Watch the errors of a run: warn where a whole library seems to be missing, end the run where too many fail."""

from __future__ import annotations

from collections.abc import Callable

from singerembed.catalog.read import Track
from singerembed.errors import TooManyErrors
from singerembed.jobs.units import Listener
from singerembed.output.schema import Counts, TrackRows

_FIRST = 100  # tracks; a share of errors says nothing of fewer, while more follow
_MISSING_IN_A_ROW = 100


class ErrorWatch(Listener):
    """A `Listener` that ends the run with TooManyErrors."""

    def __init__(self, max_errors: int | float | None, say: Callable[[str, str], None]) -> None:
        """`max_errors`: tracks with errors, a number, or a share below 1 of the tracks so far; None: any number."""
        self._max_errors, self._say = max_errors, say
        self._counts = Counts()
        self._before = 0  # tracks that an earlier run has embedded
        self._missing = 0  # in a row
        self._last = ""  # the last track that failed

    def embedded(self, track: Track, rows: TrackRows) -> None:
        """Count one track. Raises TooManyErrors."""
        counts = self._counts
        before = counts.error_tracks
        counts.add(rows)
        failed = counts.error_tracks > before
        self._missing = self._missing + 1 if rows.error is not None and rows.error.code == "not_found" else 0
        if self._missing == _MISSING_IN_A_ROW:
            which = "the first" if counts.tracks == _MISSING_IN_A_ROW else f"up to row {track.row:,},"
            self._say("warning", f"{which} {_MISSING_IN_A_ROW} recordings are all missing. Is the library mounted?")
        if failed:
            self._last = f"row {track.row:,} ({rows.error or 'NaN in its samples'})"
        if isinstance(self._max_errors, int) or counts.tracks >= _FIRST:
            self._check(counts.tracks)

    def skipped(self, tracks: int) -> None:
        """Count tracks of an earlier run, whose errors it has allowed."""
        self._before += tracks

    def all_embedded(self) -> None:
        """Look at the share of errors of few tracks too, as no more follow. Raises TooManyErrors."""
        self._check(self._before + self._counts.tracks)

    def _check(self, tracks: int) -> None:
        limit, errors = self._max_errors, self._counts.error_tracks
        if limit is not None and errors > (limit if isinstance(limit, int) else limit * tracks):
            raise TooManyErrors(
                f"{errors:,} of {tracks:,} recordings failed, the last one {self._last}; --max-errors allows no more. "
                "Finished units are safe: mend the cause and run the same command again"
            )
