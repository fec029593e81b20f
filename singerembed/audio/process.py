"""Decode in a separate process, so that a decoder that crashes or hangs costs one track: the client."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import struct
import subprocess
import sys
import threading
from typing import Any

import numpy as np

from singerembed.audio.limits import TimeLimit
from singerembed.errors import TrackError
from singerembed.model.mel import Pcm


class _DecodeProcess:
    """One decoder process, reused for the next track; killed when it hangs, replaced when it dies."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            # -P: a source tree in the working folder is not the package.
            [sys.executable, "-P", "-m", "singerembed.audio.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # a Ctrl-C in the terminal is for the run to handle
        )
        atexit.register(self.kill)

    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        atexit.unregister(self.kill)
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()

    def call(self, request: dict[str, Any], limit: TimeLimit) -> tuple[dict[str, Any], bytes]:
        """Send one request; return the reply's JSON head and its binary body. Raises TrackError."""
        try:
            assert self._process.stdin
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            head_size, body_size = struct.unpack("<II", self._receive(8, limit))
            head = json.loads(self._receive(head_size, limit))
            body = self._receive(body_size, limit)
        except (BrokenPipeError, EOFError) as exc:
            status = self._process.wait()
            self.kill()
            cause = f"signal {-status}" if status < 0 else f"status {status}"
            raise TrackError("decoder_crashed", f"the decoder crashed on it ({cause})") from exc
        except TrackError:
            self.kill()
            raise
        if "error" in head:
            raise TrackError(head["code"], head["error"], passing=head["passing"])
        return head, body

    def _receive(self, size: int, limit: TimeLimit) -> bytes:
        assert self._process.stdout
        received = bytearray()
        while len(received) < size:
            ready, _, _ = select.select([self._process.stdout], [], [], limit.remaining())
            if ready:
                chunk = os.read(self._process.stdout.fileno(), size - len(received))
                if not chunk:
                    raise EOFError
                received += chunk
        return bytes(received)


_decode_processes = threading.local()


def _decode_process() -> _DecodeProcess:
    """This thread's decoder process, started when first needed."""
    process: _DecodeProcess | None = getattr(_decode_processes, "process", None)
    if process is None or not process.alive():
        process = _decode_processes.process = _DecodeProcess()
    return process


def packet_hash(path: str, limit: TimeLimit) -> str:
    """What `hash_packets` finds in the local file `path`, in this thread's decoder process. Raises TrackError."""
    return str(_decode_process().call({"op": "hash_packets", "path": path}, limit)[0]["hash"])


class ProcessReader:
    """A decoder in this thread's decoder process: "av" is FFmpeg, "any" chooses as recording.py does. A `PcmReader`."""

    def __init__(
        self,
        path: str,
        decoder: str,
        limit: TimeLimit,
        header_seconds: float | None = None,
        promised_seconds: float = 0.0,
        *,
        channels: int = 1,
    ) -> None:
        """Open `path`; the seconds are those of `AvReader`. Raises TrackError."""
        self._process = _decode_process()
        self._limit, self._channels = limit, channels
        self.notes: list[str] = []
        seconds = {"header_seconds": header_seconds, "promised_seconds": promised_seconds}
        head, _ = self._call({"op": "open", "path": path, "decoder": decoder, "channels": channels, **seconds})
        self.sample_rate = int(head["sample_rate"])

    def _call(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        head, body = self._process.call(request, self._limit)
        self.notes = head["notes"]
        return head, body

    def read(self, n: int) -> Pcm:
        pcm = np.frombuffer(self._call({"op": "read", "n": n})[1], np.float32)
        return pcm if self._channels == 1 else pcm.reshape(-1, self._channels)

    def seek(self, sample: int) -> None:
        self._call({"op": "seek", "sample": sample})

    def length(self) -> int:
        return int(self._call({"op": "length"})[0]["length"])

    def check_complete(self) -> None:
        self._call({"op": "check_complete"})

    def close(self) -> None:
        if self._process.alive():
            with contextlib.suppress(TrackError):
                self._process.call({"op": "close"}, TimeLimit(10.0))
