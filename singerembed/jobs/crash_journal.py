"""Record which rows are being decoded, so that the run after a crash decodes them in a separate process.

A decoder that crashes ends the whole process, and would do so at every restart. The journal is a small file mapped into
memory: recording a row costs no system call, and the record outlives the process.
"""

from __future__ import annotations

import logging
import mmap
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger(__name__)
_SLOT = struct.Struct("<Q")  # the row that a thread is decoding, counted from 1; 0: none
_IN_FLIGHT = "in-flight-"
_SUSPECTS = "suspects"


class CrashJournal:
    """The journal of one process of a run, in its parts folder. Threads share it, up to `threads` of them."""

    def __init__(self, folder: str | None, threads: int, shard: int = 0) -> None:
        """Start an empty journal for process `shard` of the run. Without a folder nothing is kept. Raises OSError."""
        self.suspects: frozenset[int] = frozenset()
        size = _SLOT.size * threads
        self._map = mmap.mmap(-1, size)
        if folder is not None:
            self.suspects = frozenset(_read_suspects(Path(folder, _SUSPECTS)))
            in_flight = Path(folder, f"{_IN_FLIGHT}{shard}")
            in_flight.write_bytes(b"\0" * size)
            try:
                with in_flight.open("r+b") as file:
                    self._map = mmap.mmap(file.fileno(), 0)
            except OSError as exc:
                _log.warning("%s cannot be mapped into memory (%s): a crash is not traced to its row", folder, exc)
        self._slots = threading.local()
        self._lock = threading.Lock()
        self._n_slots = 0

    @contextmanager
    def decoding(self, row: int) -> Iterator[None]:
        """Within the block, record that this thread decodes `row`."""
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


def gather_suspects(folder: str | None) -> None:
    """Add the rows that processes were decoding when they died to the suspects of `folder`.

    Rows that living processes are decoding are suspected too, which costs them no more than a slower decoding.
    """
    if folder is None:
        return
    suspects = Path(folder, _SUSPECTS)
    rows = _read_suspects(suspects)
    for in_flight in Path(folder).glob(f"{_IN_FLIGHT}*"):
        content = in_flight.read_bytes()
        rows |= {row for (row,) in _SLOT.iter_unpack(content[: len(content) // _SLOT.size * _SLOT.size]) if row}
    if rows:
        suspects.write_text("\n".join(map(str, sorted(rows))), "ascii")


def _read_suspects(path: Path) -> set[int]:
    return {int(line) for line in path.read_text("ascii").split()} if path.exists() else set()
