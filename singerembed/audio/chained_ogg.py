"""Read a chained Ogg file, several streams end to end as radio recorders write them, as one recording.

libsndfile decodes the first stream only, and FFmpeg refuses chains that change their rate. Each stream is a whole Ogg
file, so each is opened by libsndfile for itself. Pages: RFC 3533.
"""

from __future__ import annotations

import contextlib
import io
import mmap
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
from numpy.typing import NDArray

from singerembed.audio.libsndfile import SoundFileReader
from singerembed.audio.limits import TimeLimit
from singerembed.audio.reader import PcmReader
from singerembed.audio.resampling import ResamplingReader
from singerembed.errors import TrackError
from singerembed.model.mel import Pcm

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


class _FileSlice(io.RawIOBase):
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


class ChainedReader:
    """The streams of a chained Ogg file one after another, at the rate of the first."""

    def __init__(self, path: str, offsets: list[int], limit: TimeLimit, channels: int = 1) -> None:
        """`offsets`: where the streams begin. Raises TrackError where one cannot be opened."""
        self._stack = contextlib.ExitStack()
        self._streams: list[PcmReader] = []
        self.sample_rate = 0
        with contextlib.ExitStack() as stack:
            for start, stop in pairwise([*offsets, None]):
                try:
                    part = stack.enter_context(_FileSlice(path, start or 0, stop))
                    source = SoundFileReader(path, 0, limit, part, channels=channels)
                except soundfile.LibsndfileError as exc:
                    raise TrackError("decode_failed", f"stream {len(self._streams) + 1}: {exc.error_string}") from exc
                stack.callback(source.close)
                self.sample_rate = self.sample_rate or source.sample_rate
                same = source.sample_rate == self.sample_rate
                self._streams.append(source if same else ResamplingReader(source, self.sample_rate, channels))
            self._stack = stack.pop_all()
        self._lengths = [stream.length() for stream in self._streams]
        self._current = 0

    @property
    def notes(self) -> list[str]:
        seconds = self.length() / self.sample_rate
        chained = f"{len(self._streams)} streams one after another, {seconds:.1f} s in all"
        return [chained, *dict.fromkeys(note for stream in self._streams for note in stream.notes)]

    def read(self, n: int) -> Pcm:
        parts = [self._streams[self._current].read(n)]
        while (left := n - sum(map(len, parts))) and self._current + 1 < len(self._streams):
            self._current += 1
            self._streams[self._current].seek(0)
            parts.append(self._streams[self._current].read(left))
        joined: NDArray[np.float32] = np.concatenate(parts)
        return joined

    def seek(self, sample: int) -> None:
        self._current = 0
        while self._current + 1 < len(self._streams) and sample >= self._lengths[self._current]:
            sample -= self._lengths[self._current]
            self._current += 1
        self._streams[self._current].seek(sample)

    def length(self) -> int:
        return sum(self._lengths)

    def check_complete(self) -> None:
        for stream in self._streams:
            stream.check_complete()

    def close(self) -> None:
        self._stack.close()
