"""What a finished output knows of its tracks: a row a track, without embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from singerembed.catalog.row_file import RowFile
from singerembed.output.finished import FinishedOutput, track_bounds
from singerembed.output.schema import conformed


class KnownTracks:
    """The tracks of a finished output, in its order. Must be closed."""

    def __init__(self, output: FinishedOutput) -> None:
        """Read them; of a track's rows the last is taken, which has its error."""
        names = [name for name in output.schema.names if name != "embedding"]
        self.rows = RowFile(pa.schema([output.schema.field(name) for name in names]))
        self.odd_units: set[int] = set()  # whose part file has other columns than the output
        counts: list[int] = []
        units: list[int] = []
        for unit in range(output.n_units):
            rows = output.rows(unit, names)
            bounds = track_bounds(rows)
            counts += np.diff(bounds).tolist()
            units.append(len(bounds) - 1)
            if rows.schema.names != names or rows.schema.types != self.rows.schema.types:
                self.odd_units.add(unit)
            if units[-1]:
                self.rows.write(conformed(rows.take(pa.array(np.array(bounds[1:]) - 1)), self.rows.schema))
        self.rows.finish()
        self._ends = np.cumsum([0, *units])
        self._row_counts = np.array(counts, np.int64)

    def __len__(self) -> int:
        return len(self._row_counts)

    @property
    def n_units(self) -> int:
        return len(self._ends) - 1

    def last_unit(self) -> tuple[int, NDArray[np.int64]]:
        """The number of the last unit, and its tracks."""
        return self.n_units - 1, np.arange(self._ends[-2], self._ends[-1])

    def units(self) -> Iterator[tuple[int, NDArray[np.int64], list[tuple[int, int]]]]:
        """Yield each unit's number, its tracks, and the first and last row of each, counted from the unit's first."""
        for unit, (first, stop) in enumerate(pairwise(self._ends.tolist())):
            bounds = np.cumsum([0, *self._row_counts[first:stop].tolist()]).tolist()
            yield unit, np.arange(first, stop), list(pairwise(bounds))

    def close(self) -> None:
        """Remove the temporary file."""
        self.rows.close()
