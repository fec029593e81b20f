"""Draw the progress bar of a run, and print the notes around it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Never

from tqdm import tqdm

from singerembed.catalog.read import Track
from singerembed.jobs.units import Listener
from singerembed.model.spec import BUNDLED_NAME, ModelSpec
from singerembed.output.schema import Counts, TrackRows
from singerembed.storage import printable, redacted

_BAR_FORMAT = "{percentage:3.0f}% {bar} | {n_fmt}/{total_fmt} tracks{desc} | {remaining} left"


class ProgressBar(Listener):
    """A `Listener` that draws on stderr, on a terminal only, unless `quiet`."""

    def __init__(self, note: Callable[[str, str], None], *, quiet: bool) -> None:
        self._note, self._quiet = note, quiet
        self._bar: tqdm[Never] | None = None
        self._counts = Counts()
        self._started = time.monotonic()
        self.first_error = ""

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def started(self, spec: ModelSpec, description: str, total_tracks: int) -> None:
        """Print the engine, and draw an empty bar; the processes of several devices each call this."""
        advice = (
            " - for production build one from the official weights: singerembed build-engine byol"
            if spec.name == BUNDLED_NAME
            else ""
        )
        self._note("engine", f"{description}{advice}")
        if self._bar is not None:
            return
        self._started = time.monotonic()
        show = not self._quiet and sys.stderr.isatty()
        self._bar = tqdm(total=total_tracks, bar_format=_BAR_FORMAT, disable=not show, leave=False, dynamic_ncols=True)

    def resumed(self, units: int) -> None:
        """Print how many units an earlier run had done."""
        self._note("resume", f"{units:,} units were done before (same catalogue, engine and options)")

    def skipped(self, tracks: int) -> None:
        """Count a unit that was done before."""
        if self._bar is not None and not self._bar.disable:
            self._bar.update(tracks)
            self._bar.initial += tracks  # they say nothing about this run's speed

    def embedded(self, track: Track, rows: TrackRows) -> None:
        """Count a track."""
        self._counts.add(rows)
        if not self.first_error and rows.error is not None:
            self.first_error = f"row {track.row:,} {printable(redacted(track.path))}: {printable(str(rows.error))}"
        if self._bar is not None and not self._bar.disable:
            elapsed = time.monotonic() - self._started
            crops, seconds, errors = self._counts.crops, self._counts.audio_seconds, self._counts.errors.total()
            self._bar.set_description_str(
                f" | {crops / elapsed:.0f} crops/s | {seconds / elapsed:.0f}x real time | {errors} errors",
                refresh=False,
            )
            self._bar.update()
