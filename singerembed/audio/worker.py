"""Decode in a separate process: the server, `python -m singerembed.audio.worker`, driven by process.py.

Requests are JSON, one a line, on standard input. A reply on standard output is two little-endian uint32 sizes, a JSON
head and a binary body (float32 samples, interleaved). The process may crash or be killed at any time.
"""

from __future__ import annotations

import json
import math
import struct
import sys
from functools import partial
from typing import Any

import av
import av.error
import numpy as np

from singerembed import storage
from singerembed.audio.ffmpeg import AvReader
from singerembed.audio.limits import TimeLimit
from singerembed.audio.packets import hash_packets
from singerembed.audio.reader import PcmReader
from singerembed.audio.recording import open_source
from singerembed.errors import TrackError


def _open(path: str, decoder: str, channels: int, header_seconds: float | None, promised_seconds: float) -> PcmReader:
    if decoder == "any":
        # The client limits the time and resamples. Rate 0 never matches, so samples come as float32.
        return open_source(path, 0, TimeLimit(math.inf), partial(_open_av, path, channels), channels)
    return _open_av(path, channels, header_seconds, promised_seconds)


def _open_av(path: str, channels: int, header_seconds: float | None, promised_seconds: float) -> PcmReader:
    try:
        return AvReader(path, header_seconds, promised_seconds, channels=channels)
    except av.error.FFmpegError as exc:
        head = _error_head(exc)
        raise TrackError(head["code"], head["error"], passing=head["passing"]) from exc


class _Server:
    """Serves requests about one open recording at a time."""

    def __init__(self) -> None:
        self._reader: PcmReader | None = None

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """The head and body of the reply to `request`. Raises what decoders raise."""
        operation = request["op"]
        if operation == "open":
            self._close()
            del request["op"]
            self._reader = _open(**request)
            return self._head(sample_rate=self._reader.sample_rate), b""
        if operation == "hash_packets":
            return {"hash": hash_packets(request["path"])}, b""
        if operation == "close" or self._reader is None:
            self._close()
        elif operation == "read":
            body = self._reader.read(request["n"]).astype(np.float32, copy=False).tobytes()
            return self._head(), body
        elif operation == "seek":
            self._reader.seek(request["sample"])
        elif operation == "length":
            return self._head(length=self._reader.length()), b""
        elif operation == "check_complete":
            self._reader.check_complete()
        return self._head(), b""

    def _head(self, **fields: int) -> dict[str, Any]:
        return {**fields, "notes": self._reader.notes if self._reader else []}

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def _error_head(exc: Exception) -> dict[str, Any]:
    reason = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
    number = getattr(exc, "errno", None)
    if isinstance(number, int) and storage.may_pass(OSError(number, reason)):
        return {"code": "unreadable", "error": f"reading failed: {reason}", "passing": True}
    return {"code": "decode_failed", "error": f"cannot decode: {reason}", "passing": False}


def main() -> None:
    """Serve requests until standard input ends."""
    av.logging.set_level(None)
    server = _Server()
    for line in sys.stdin.buffer:
        body = b""
        try:
            head, body = server.answer(json.loads(line))
        except TrackError as exc:
            head = {"code": exc.code, "error": str(exc), "passing": exc.passing}
        except (ValueError, MemoryError, OSError, av.error.FFmpegError) as exc:
            head = _error_head(exc)
        encoded = json.dumps(head).encode()
        sys.stdout.buffer.write(struct.pack("<II", len(encoded), len(body)) + encoded + body)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
