"""Decode in a separate process: the server, `python -m singerembed.audio.worker`, driven by process.py.

Requests are JSON, one a line, on standard input. A reply on standard output is two little-endian uint32 sizes, a JSON
head and a binary body (float32 mono samples). The process may crash or be killed at any time.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import av.error
import numpy as np
import soundfile
from numpy.typing import NDArray

from singerembed.audio.limits import TimeLimit, check_format, check_length
from singerembed.audio.recording import PcmReader, SoundFileReader
from singerembed.errors import TrackError
from singerembed.model.mel import mix_down

_SKIP_SAMPLES = 1 << 20


class _AvReader:
    """FFmpeg through PyAV: one open file, decoded frame by frame from its start.

    Seeking decodes forward and drops what lies before: FFmpeg's AAC decoder fills noise bands from a generator whose
    state is the whole past, so a seek in the container would give other samples than a full read.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._open()

    def _open(self) -> None:
        self._container = av.open(self._path, metadata_errors="ignore")
        if not self._container.streams.audio:
            self._container.close()
            raise TrackError("no_audio", "the file has no audio stream")
        self._stream = self._container.streams.audio[0]
        self.sample_rate: int = self._stream.rate
        self._channels: int = self._stream.channels
        check_format(self.sample_rate, self._channels)
        time_base = self._stream.time_base or Fraction(1, self.sample_rate)
        self.n_samples = round((self._stream.duration or 0) * time_base * self.sample_rate)
        self._resampler = av.AudioResampler(format="flt", layout=self._stream.layout, rate=self.sample_rate)
        self._chunks = self._decode()
        self._rest: NDArray[np.float32] = np.empty(0, np.float32)
        self._position = 0

    def _decode(self) -> Iterator[NDArray[np.float32]]:
        for frame in self._container.decode(self._stream):
            for packed in self._resampler.resample(frame):
                yield mix_down(np.ascontiguousarray(packed.to_ndarray().reshape(-1, self._channels)))

    def read(self, n: int) -> NDArray[np.float32]:
        chunks, have = [self._rest], len(self._rest)
        while have < n and (chunk := next(self._chunks, None)) is not None:
            chunks.append(chunk)
            have += len(chunk)
        joined = np.concatenate(chunks)
        self._rest = joined[n:]
        self._position += min(n, have)
        return joined[:n]

    def seek(self, sample: int) -> None:
        if sample < self._position:
            self.close()
            self._open()
        while self._position < sample and len(self.read(min(_SKIP_SAMPLES, sample - self._position))):
            pass

    def check_complete(self) -> None:
        check_length(self.n_samples, self._position, self.sample_rate)

    def close(self) -> None:
        self._container.close()


def _open(path: str, decoder: str) -> PcmReader:
    if decoder == "soundfile":
        # The client limits the time and resamples. Rate 0 never matches, so samples come as float32.
        with contextlib.suppress(soundfile.LibsndfileError):
            return SoundFileReader(path, 0, TimeLimit(math.inf))
    return _AvReader(path)


class _Server:
    """Serves requests about one open recording at a time."""

    def __init__(self) -> None:
        self._reader: PcmReader | None = None

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """The head and body of the reply to `request`. Raises what decoders raise."""
        operation = request["op"]
        if operation == "open":
            self._close()
            self._reader = _open(request["path"], request["decoder"])
            return {"sample_rate": self._reader.sample_rate, "n_samples": self._reader.n_samples}, b""
        if operation == "close" or self._reader is None:
            self._close()
        elif operation == "read":
            return {}, self._reader.read(request["n"]).astype(np.float32, copy=False).tobytes()
        elif operation == "seek":
            self._reader.seek(request["sample"])
        elif operation == "check_complete":
            self._reader.check_complete()
        return {}, b""

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def main() -> None:
    """Serve requests until standard input ends."""
    av.logging.set_level(None)
    server = _Server()
    for line in sys.stdin.buffer:
        body = b""
        try:
            head, body = server.answer(json.loads(line))
        except TrackError as exc:
            head = {"code": exc.code, "error": str(exc)}
        except (ValueError, MemoryError, OSError, av.error.FFmpegError) as exc:
            reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
            head = {"code": "decode_failed", "error": f"cannot decode: {reason}"}
        encoded = json.dumps(head).encode()
        sys.stdout.buffer.write(struct.pack("<II", len(encoded), len(body)) + encoded + body)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
