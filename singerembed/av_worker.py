"""The PyAV decoder process: `python -m singerembed.av_worker`, driven by audio.py over its standard streams.

One JSON request a line comes in; a reply is two little-endian uint32 sizes, a JSON head and a binary body (float32
mono samples). It imports nothing heavy, and may crash or be killed at any time.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import av
import av.error
import numpy as np
from numpy.typing import NDArray

from singerembed.mel import mix_down

_SKIP_SAMPLES = 1 << 20


class _Recording:
    """One open file, decoded frame by frame from its start.

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
            raise ValueError("the file has no audio stream")
        self._stream = self._container.streams.audio[0]
        self.sample_rate: int = self._stream.rate
        self.channels: int = self._stream.channels
        time_base = self._stream.time_base or Fraction(1, self.sample_rate)
        self.n_samples = round((self._stream.duration or 0) * time_base * self.sample_rate)
        self._resampler = av.AudioResampler(format="flt", layout=self._stream.layout, rate=self.sample_rate)
        self._chunks = self._decode()
        self._rest: NDArray[np.float32] = np.empty(0, np.float32)
        self._position = 0

    def _decode(self) -> Iterator[NDArray[np.float32]]:
        for frame in self._container.decode(self._stream):
            for packed in self._resampler.resample(frame):
                yield mix_down(np.ascontiguousarray(packed.to_ndarray().reshape(-1, self.channels)))

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

    def close(self) -> None:
        self._container.close()


def _answer(recording: _Recording | None, request: dict[str, Any]) -> tuple[_Recording | None, dict[str, Any], bytes]:
    if request["op"] == "open":
        if recording:
            recording.close()
        recording = _Recording(request["path"])
        head = {"sample_rate": recording.sample_rate, "channels": recording.channels, "n_samples": recording.n_samples}
        return recording, head, b""
    if recording is None:
        raise ValueError("no file is open")
    if request["op"] == "read":
        return recording, {}, recording.read(request["n"]).tobytes()
    if request["op"] == "seek":
        recording.seek(request["sample"])
        return recording, {}, b""
    recording.close()
    return None, {}, b""


def main() -> None:
    """Serve requests until standard input ends."""
    av.logging.set_level(None)
    recording: _Recording | None = None
    for line in sys.stdin.buffer:
        body = b""
        try:
            recording, head, body = _answer(recording, json.loads(line))
        except (ValueError, MemoryError, OSError, av.error.FFmpegError) as exc:
            reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
            head = {
                "code": "no_audio" if "no audio stream" in reason else "decode_failed",
                "error": f"cannot decode: {reason}",
            }
        encoded = json.dumps(head).encode()
        sys.stdout.buffer.write(struct.pack("<II", len(encoded), len(body)) + encoded + body)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
