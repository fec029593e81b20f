"""Watch for accompaniment in the recordings of a run: where most hold some, say what that means and what to do."""

from __future__ import annotations

from collections.abc import Callable

from singerembed.catalog.read import Track
from singerembed.jobs.units import Listener
from singerembed.output.schema import TrackRows

_ENOUGH = 8  # recordings that were looked at
_MANY = 0.5  # of them hold accompaniment; of voices alone one in twenty is taken for a mixture


class MixtureWatch(Listener):
    """A `Listener` that counts what `TrackRows.seems_mixed` says."""

    def __init__(self, say: Callable[[str, str], None]) -> None:
        self._say = say
        self._looked_at = self._mixed = 0

    def embedded(self, track: Track, rows: TrackRows) -> None:
        """Count one track."""
        if rows.seems_mixed is not None:
            self._looked_at += 1
            self._mixed += rows.seems_mixed

    def conclude(self) -> None:
        """Warn if the recordings seem to be mixes."""
        if self._looked_at >= _ENOUGH and self._mixed > _MANY * self._looked_at:
            self._say(
                "warning",
                f"{self._mixed:,} of {self._looked_at:,} recordings that were looked at seem to hold a band: their "
                "embeddings are of voice and band together, and tell singers apart badly. Separate the voice: "
                "singerembed build-engine spleeter, then run --separate spleeter.engine (docs/mixes.md)",
            )
