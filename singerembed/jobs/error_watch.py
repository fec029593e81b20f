"""Watch the errors of a run: warn where a whole library seems to be missing, end the run where too many fail."""

from __future__ import annotations

from collections.abc import Callable

from singerembed.catalog.read import Track
from singerembed.errors import TooManyErrors
from singerembed.jobs.units import Listener
from singerembed.output.schema import Counts, TrackRows

_FIRST = 100  # tracks; a share of errors says nothing of fewer
_MISSING_IN_A_ROW = 100


class ErrorWatch(Listener):
    """A `Listener` that ends the run with TooManyErrors."""

    def __init__(self, max_errors: int | float | None, say: Callable[[str, str], None]) -> None:
        """`max_errors`: tracks with errors, a number, or a share below 1 of the tracks so far; None: any number."""
        self._max_errors, self._say = max_errors, say
        self._counts = Counts()
        self._missing = 0  # in a row

    def embedded(self, track: Track, rows: TrackRows) -> None:
        """Count one track. Raises TooManyErrors."""
        counts = self._counts
        counts.add(rows)
        self._missing = self._missing + 1 if rows.error is not None and rows.error.code == "not_found" else 0
        if self._missing == _MISSING_IN_A_ROW:
            which = "the first" if counts.tracks == _MISSING_IN_A_ROW else f"up to row {track.row:,},"
            self._say("warning", f"{which} {_MISSING_IN_A_ROW} recordings are all missing. Is the library mounted?")
        limit = self._max_errors
        if limit is None:
            return
        if counts.error_tracks > limit if isinstance(limit, int) else self._share_is_above(limit):
            raise TooManyErrors(
                f"{counts.error_tracks:,} of {counts.tracks:,} recordings failed, the last one row {track.row:,} "
                f"({rows.error or 'NaN in its samples'}); --max-errors allows no more. Finished units are safe: mend "
                "the cause and run the same command again"
            )

    def _share_is_above(self, share: float) -> bool:
        return self._counts.tracks >= _FIRST and self._counts.error_tracks > share * self._counts.tracks
