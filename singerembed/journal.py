"""Remembers which rows were being decoded when a run died, so that the next run decodes them in another process.

A decoder that crashes takes the whole process with it, and would do so again and again. The journal is a small file
mapped into memory: noting a row costs no system call, and what was noted outlives the process.
"""

from __future__ import annotations

import mmap
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SLOT = struct.Struct("<Q")  # the row that a thread is decoding, counted from 1; 0: none
_IN_FLIGHT = "in-flight"
_SUSPECTS = "suspects"


class CrashJournal:
    """The journal of one run, in its parts folder. Threads may share it, up to `threads` of them."""

    def __init__(self, folder: str | None, threads: int) -> None:
        """Read what a run that died has left in `folder`, and start afresh. None: remember nothing. Raises OSError."""
        rows: set[int] = set()
        if folder is None:
            self._map = mmap.mmap(-1, _SLOT.size * threads)
        else:
            in_flight, suspects = Path(folder, _IN_FLIGHT), Path(folder, _SUSPECTS)
            rows = _rows_of(in_flight, suspects)
            if rows:
                suspects.write_text("\n".join(map(str, sorted(rows))), "ascii")
            in_flight.write_bytes(b"\0" * _SLOT.size * threads)
            with in_flight.open("r+b") as file:
                self._map = mmap.mmap(file.fileno(), 0)
        self.suspects = frozenset(rows)
        self._slots = threading.local()
        self._lock = threading.Lock()
        self._n_slots = 0

    @contextmanager
    def decoding(self, row: int) -> Iterator[None]:
        """Within the block, `row` is noted as being decoded by this thread."""
        offset = self._offset()
        _SLOT.pack_into(self._map, offset, row)
        try:
            yield
        finally:
            _SLOT.pack_into(self._map, offset, 0)

    def close(self) -> None:
        """Release the file."""
        self._map.close()

    def _offset(self) -> int:
        if not hasattr(self._slots, "offset"):
            with self._lock:
                self._slots.offset = self._n_slots * _SLOT.size
                self._n_slots += 1
        return int(self._slots.offset)


def _rows_of(in_flight: Path, suspects: Path) -> set[int]:
    rows = {int(line) for line in suspects.read_text("ascii").split()} if suspects.exists() else set()
    if in_flight.exists():
        content = in_flight.read_bytes()
        rows |= {row for (row,) in _SLOT.iter_unpack(content[: len(content) // _SLOT.size * _SLOT.size]) if row}
    return rows
