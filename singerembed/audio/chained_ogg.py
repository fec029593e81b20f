"""Read a chained Ogg file, several streams end to end as radio recorders write them, as one recording.

libsndfile decodes the first stream only, and FFmpeg refuses chains that change their rate. Each stream is a whole Ogg
file, so each is opened by libsndfile for itself. Pages: RFC 3533.
"""

from __future__ import annotations

import io
import mmap
from pathlib import Path
from typing import BinaryIO

_PAGE_HEADER = 27  # bytes before the table of segments
_FIRST_PAGE = 0x02  # flag: beginning of a stream


def stream_offsets(path: str) -> list[int]:
    """Offsets of the streams in the Ogg file `path`; one offset where the file is not chained. Raises OSError.

    A page that begins a stream right behind another such page belongs to the same link of the chain (several streams at
    once), and then the file counts as not chained.
    """
    starts: list[int] = []
    previous_was_first = False
    with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        position = content.find(b"OggS")
        while position >= 0 and position + _PAGE_HEADER <= len(content):
            n_segments = content[position + 26]
            table = content[position + _PAGE_HEADER : position + _PAGE_HEADER + n_segments]
            end = position + _PAGE_HEADER + n_segments + sum(table)
            if content[position + 5] & _FIRST_PAGE:
                if starts and previous_was_first:
                    return starts[:1]
                starts.append(position)
            previous_was_first = bool(content[position + 5] & _FIRST_PAGE)
            position = end if content[end : end + 4] == b"OggS" else content.find(b"OggS", position + 4)
    return starts


class FileSlice(io.RawIOBase):
    """Bytes `start` to `stop` of a file, as a file."""

    def __init__(self, path: str, start: int, stop: int | None) -> None:
        self._file: BinaryIO = Path(path).open("rb", buffering=0)  # noqa: SIM115  (closed by close)
        self._start = start
        self._stop = self._file.seek(0, io.SEEK_END) if stop is None else stop
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: self._start, io.SEEK_CUR: self._file.tell(), io.SEEK_END: self._stop}[whence]
        return self._file.seek(max(self._start, base + offset)) - self._start

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        left = max(0, self._stop - self._file.tell())
        return self._file.readinto(memoryview(buffer)[:left]) or 0  # type: ignore[attr-defined]

    def close(self) -> None:
        self._file.close()
        super().close()
