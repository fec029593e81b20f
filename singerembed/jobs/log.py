"""Write the log of a run: one JSON object a line, the last one a report of the whole run."""

from __future__ import annotations

import contextlib
import heapq
import json
import logging
import time
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from singerembed.catalog.read import Track
from singerembed.jobs.units import Listener
from singerembed.model.spec import ModelSpec
from singerembed.output.schema import Counts, TrackRows
from singerembed.storage import printable, redacted, scrubbed, writing

_log = logging.getLogger(__name__)
_SLOWEST = 10
_EXAMPLES = 3  # of each error code
_HOUR = 3600.0


class RunLog(Listener):
    """A `Listener` that appends every event to a file at once, so that the log of a killed run is complete."""

    def __init__(self, path: str) -> None:
        """Append to `path`. Raises OutputError."""
        with writing(f"the log {path}"):
            self._file = Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115  (open for the run)
        self._path = path
        self.summary: dict[str, Any] | None = None  # of the output, for the last line
        self._started = time.monotonic()
        self._counts = Counts()
        self._crops_by_hour: defaultdict[int, int] = defaultdict(int)
        self._slowest: list[tuple[float, int, str]] = []
        self._examples: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)

    def _write(self, event: str, **fields: Any) -> None:
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
        if self._file.closed:
            return
        try:
            self._file.write(json.dumps(line) + "\n")
        except OSError as exc:
            _log.warning("cannot write to the log %s (%s); the run goes on without it", self._path, exc.strerror)
            with contextlib.suppress(OSError):
                self._file.close()

    def note(self, what: str, text: str) -> None:
        """Log what a person is told: its subject and the text."""
        self._write("note", what=what, text=printable(scrubbed(text)))

    def started(self, spec: ModelSpec, description: str, total_tracks: int) -> None:
        """Log the engine."""
        self._write("started", engine=description, weights=spec.weights_sha256, tracks=total_tracks)

    def resumed(self, units: int) -> None:
        """Log that an earlier run's units are used."""
        self._write("resumed", units=units)

    def embedded(self, track: Track, rows: TrackRows) -> None:
        """Log one track."""
        counts = Counts()
        counts.add(rows)
        self._counts.merge(counts)
        self._crops_by_hour[int((time.monotonic() - self._started) // _HOUR)] += counts.crops
        path = printable(redacted(track.path))
        entry = (rows.seconds, track.row, path)
        (heapq.heappush if len(self._slowest) < _SLOWEST else heapq.heappushpop)(self._slowest, entry)
        fields: dict[str, Any] = {"row": track.row, "track_id": printable(track.track_id), "path": path}
        if counts.errors:
            message = str(rows.error) if rows.error else ""
            fields |= {"error_code": next(iter(counts.errors)), "error": printable(message)}
            examples = self._examples[fields["error_code"]]
            if len(examples) < _EXAMPLES:
                examples.append(dict(fields))
        if rows.note:
            fields["audio_note"] = printable(rows.note)
        self._write("track", **fields, crops=counts.crops, silent=counts.silent, seconds=round(rows.seconds, 4))

    def published(self, unit: int, counts: Counts) -> None:
        """Log one unit."""
        self._write("unit", unit=unit, tracks=counts.tracks, crops=counts.crops, errors=dict(counts.errors))

    def finished(self, outcome: str) -> None:
        """Log the report: counts, speed by hour, the slowest tracks, and examples of each error."""
        seconds = time.monotonic() - self._started
        self._write(
            "finished",
            outcome=outcome,
            output=self.summary,
            seconds=round(seconds, 3),
            embedded=self._counts.to_dict(),
            silent_share=round(self._counts.silent / max(1, self._counts.crops), 4),
            crops_by_hour=[self._crops_by_hour[hour] for hour in range(int(seconds // _HOUR) + 1)],
            slowest=[
                {"seconds": round(s, 3), "row": row, "path": path} for s, row, path in sorted(self._slowest)[::-1]
            ],
            errors=dict(self._examples),
        )

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()
