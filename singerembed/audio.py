"""Opens recordings, decodes, mixes down to mono and resamples; the seam between soundfile and PyAV.

soundfile decodes what it can, in this process. What it cannot open goes to PyAV in a process of its own (av_worker),
because FFmpeg's many demuxers meet many strange files, and a crash or a hang there must cost one track only.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import os
import re
import select
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
import soxr

from singerembed import storage
from singerembed.errors import MissingDependencyError, TrackError
from singerembed.mel import Pcm, mix_down

DEFAULT_TRACK_TIMEOUT_SECONDS = 600.0
# Beyond these a header is damaged or hostile: no singer was recorded so.
MAX_CHANNELS = 64
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1_000, 768_000  # Hz
# Sources whose samples int16 holds exactly.
_INT16_SUBTYPES = {"PCM_16", "PCM_S8", "PCM_U8"}
# How far decoding may end before the length that the header promises: encoder delay and padding are trimmed by some.
_SHORTFALL_SECONDS = 0.5
# soxr's HQ filter is a few hundred input samples long; a warm-up of this length leaves no trace of the cut.
_RESAMPLER_WARMUP_SECONDS = 0.1
_READ_SECONDS = 4.0
# libvorbis was seen to give half a block of wrong samples at the place of a seek; its blocks have up to 8192 samples.
_SEEK_WARMUP_SAMPLES = {"VORBIS": 8192}


class PcmReader(Protocol):
    """A mono recording that is read from front to back, with seeking."""

    sample_rate: int  # Hz
    n_samples: int  # promised by the header; 0 if it does not say

    def read(self, n: int) -> Pcm:
        """Return the next `n` samples, fewer only at the end. Raises TrackError."""
        ...

    def seek(self, sample: int) -> None:
        """Go to `sample`, counted from the beginning of the recording; past the end, nothing is left to read."""
        ...

    def check_complete(self) -> None:
        """After everything was read: raise TrackError if the file broke off, or promised more than there was."""
        ...

    def close(self) -> None: ...


class TimeLimit:
    """How long decoding one track may take; time spent elsewhere (in the encoder, say) does not count."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._left = seconds
        self._started: float | None = None

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Within this block the clock runs."""
        self._started = time.monotonic()
        try:
            yield
        finally:
            self._left -= time.monotonic() - self._started
            self._started = None

    def remaining(self) -> float:
        """Seconds left; raises TrackError once there are none."""
        left = self._left if self._started is None else self._left - (time.monotonic() - self._started)
        if left <= 0:
            raise TrackError("decode_timeout", f"decoding took longer than {self._seconds:g} s (--track-timeout)")
        return left


@contextlib.contextmanager
def open_recording(location: str, sample_rate: int, limit: TimeLimit) -> Iterator[PcmReader]:
    """Open the recording at `location`, a local path or a URI, as mono at `sample_rate` Hz.

    Raises TrackError with code not_found, unreadable, no_audio, unsupported, decode_failed, decoder_crashed or
    decode_timeout.
    """
    with _local_copy(location) as path:
        _check_file(path)
        try:
            source: PcmReader = _SoundFileReader(path, sample_rate, limit)
        except soundfile.LibsndfileError:
            source = _AvReader(path, limit)
        with contextlib.closing(source):
            yield source if source.sample_rate == sample_rate else _ResamplingReader(source, sample_rate)


@contextlib.contextmanager
def _local_copy(location: str) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(storage.local_copy(location))
        except FileNotFoundError as exc:
            raise TrackError("not_found", "file not found") from exc
        except MissingDependencyError:
            raise
        except Exception as exc:  # each fsspec file system has exceptions of its own
            raise TrackError("unreadable", _reason(exc)) from exc
        yield path


def _check_file(path: str) -> None:
    try:
        info = Path(path).stat()
        if stat.S_ISDIR(info.st_mode):
            raise TrackError("unreadable", "is a folder, not a file")
        if not stat.S_ISREG(info.st_mode):  # a pipe would block whoever opens it
            raise TrackError("unreadable", "is not a regular file")
        with Path(path).open("rb"):
            pass
    except FileNotFoundError as exc:
        raise TrackError("not_found", "file not found") from exc
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the name
        raise TrackError("unreadable", _reason(exc)) from exc
    if info.st_size == 0:
        raise TrackError("no_audio", "the file is empty")


def _reason(exc: Exception) -> str:
    return os.strerror(exc.errno) if isinstance(exc, OSError) and exc.errno else str(exc)


def _check_format(sample_rate: int, channels: int) -> None:
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
        raise TrackError(
            "unsupported", f"sample rate {sample_rate} Hz is outside {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE}"
        )
    if not 1 <= channels <= MAX_CHANNELS:
        raise TrackError("unsupported", f"{channels} channels; at most {MAX_CHANNELS} are read")


def _check_length(promised: int, read: int, sample_rate: int) -> None:
    if promised - read > _SHORTFALL_SECONDS * sample_rate:
        raise TrackError(
            "truncated",
            f"the header promises {promised / sample_rate:.1f} s, decoding ended at {read / sample_rate:.1f} s",
        )


# --- soundfile ------------------------------------------------------------------------------------------------------


class _SoundFileReader:
    """libsndfile, in this process. Seeks are exact to the sample."""

    def __init__(self, path: str, wanted_rate: int, limit: TimeLimit) -> None:
        self._file = soundfile.SoundFile(path)
        self._limit = limit
        self._position = 0
        self._failure: TrackError | None = None
        self.sample_rate = self._file.samplerate
        self.n_samples = self._file.frames
        try:
            _check_format(self.sample_rate, self._file.channels)
        except TrackError:
            self._file.close()
            raise
        mono_16_bit = self._file.channels == 1 and self._file.subtype in _INT16_SUBTYPES
        self._dtype = "int16" if mono_16_bit and self.sample_rate == wanted_rate else "float32"

    def read(self, n: int) -> Pcm:
        self._limit.remaining()
        if self._failure:
            raise self._failure
        n = min(
            n, max(0, self.n_samples - self._position)
        )  # a buffer by what the header promises, not by what is asked
        pcm = np.empty((n, self._file.channels), self._dtype)
        try:
            got = len(self._file.read(out=pcm))
        except soundfile.LibsndfileError as exc:
            # What was decoded before the damage is good and lies in the buffer; the failure comes with the next call.
            got = max(0, self._file.tell() - self._position)
            self._failure = TrackError(
                "decode_failed", f"decoding failed after {self._seconds(got)}: {exc.error_string}"
            )
        self._position += got
        return pcm[:got, 0] if pcm.shape[1] == 1 else mix_down(pcm[:got])

    def seek(self, sample: int) -> None:
        sample = min(sample, self.n_samples)
        warmup = min(sample, _SEEK_WARMUP_SAMPLES.get(self._file.subtype, 0))
        try:
            self._file.seek(sample - warmup)
            self._file.read(warmup, dtype="float32")
        except soundfile.LibsndfileError as exc:
            raise TrackError(
                "decode_failed", f"seeking to {sample / self.sample_rate:.1f} s failed: {exc.error_string}"
            ) from exc
        self._position = sample

    def check_complete(self) -> None:
        if self._failure:
            raise self._failure
        log = self._file.extra_info
        # RIFF and AIFF: libsndfile corrects the length in silence and leaves a line of this form in its log. Sizes of
        # 0 and of 2 GiB and above are what programs write that stream to a pipe.
        for promised, actual in re.findall(r"^\s*(?:data|SSND)\s*: (\d+) \(should be (\d+)\)", log, re.MULTILINE):
            if 0 < int(actual) < int(promised) < 2**31 - 1:
                share = f"{int(actual) / int(promised):.0%} of its audio is there"
                raise TrackError("truncated", f"the file is cut: {share}, decoding ended at {self._seconds()}")
        if re.search(r"lacks an end-of-stream bit|without an End-Of-Stream", log):
            raise TrackError(
                "truncated", f"the file is cut: its stream has no end, decoding ended at {self._seconds()}"
            )
        _check_length(self.n_samples, self._position, self.sample_rate)

    def _seconds(self, more: int = 0) -> str:
        return f"{(self._position + more) / self.sample_rate:.1f} s"

    def close(self) -> None:
        self._file.close()


# --- resampling -----------------------------------------------------------------------------------------------------


class _ResamplingReader:
    """soxr over the continuous signal, so that a sample does not depend on which crops were asked for."""

    def __init__(self, source: PcmReader, sample_rate: int) -> None:
        self._source = source
        self.sample_rate = sample_rate
        self.n_samples = round(source.n_samples * sample_rate / source.sample_rate)
        self._restart()

    def _restart(self) -> None:
        self._soxr = soxr.ResampleStream(self._source.sample_rate, self.sample_rate, 1, dtype="float32")
        self._pending: list[np.ndarray[Any, np.dtype[np.float32]]] = []
        self._ended = False

    def read(self, n: int) -> Pcm:
        have = sum(map(len, self._pending))
        block = round(_READ_SECONDS * self._source.sample_rate)
        while have < n and not self._ended:
            pcm = self._source.read(block)
            self._ended = len(pcm) < block
            chunk = self._soxr.resample_chunk(np.ascontiguousarray(pcm, np.float32), last=self._ended)
            self._pending.append(chunk)
            have += len(chunk)
        joined = np.concatenate(self._pending) if self._pending else np.empty(0, np.float32)
        self._pending = [joined[n:]]
        return joined[:n]

    def seek(self, sample: int) -> None:
        """Restart the filter a little before `sample`, at an input sample that coincides with an output sample."""
        common = math.gcd(self.sample_rate, self._source.sample_rate)
        out_step, in_step = self.sample_rate // common, self._source.sample_rate // common
        steps = max(0, sample - round(_RESAMPLER_WARMUP_SECONDS * self.sample_rate)) // out_step
        self._source.seek(steps * in_step)
        self._restart()
        self.read(sample - steps * out_step)

    def check_complete(self) -> None:
        self._source.check_complete()

    def close(self) -> None:
        self._source.close()


# --- PyAV, in a process of its own ----------------------------------------------------------------------------------


class _AvProcess:
    """One decoder process, kept for the next track; killed when it hangs, replaced when it dies."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "singerembed.av_worker"],
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
            raise TrackError("decoder_crashed", f"the decoder died of it ({cause})") from exc
        except TrackError:
            self.kill()
            raise
        if "error" in head:
            raise TrackError(head["code"], head["error"])
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


_av_processes = threading.local()


def _av_process() -> _AvProcess:
    """This thread's decoder process, started when first needed."""
    process: _AvProcess | None = getattr(_av_processes, "process", None)
    if process is None or not process.alive():
        process = _av_processes.process = _AvProcess()
    return process


class _AvReader:
    """FFmpeg through PyAV, in this thread's decoder process."""

    def __init__(self, path: str, limit: TimeLimit) -> None:
        self._process = _av_process()
        self._limit = limit
        self._position = 0
        head, _ = self._process.call({"op": "open", "path": os.fspath(path)}, limit)
        self.sample_rate = int(head["sample_rate"])
        self.n_samples = int(head["n_samples"])
        _check_format(self.sample_rate, int(head["channels"]))

    def read(self, n: int) -> Pcm:
        _, body = self._process.call({"op": "read", "n": n}, self._limit)
        pcm = np.frombuffer(body, np.float32)
        self._position += len(pcm)
        return pcm

    def seek(self, sample: int) -> None:
        self._process.call({"op": "seek", "sample": sample}, self._limit)
        self._position = sample

    def check_complete(self) -> None:
        _check_length(self.n_samples, self._position, self.sample_rate)

    def close(self) -> None:
        if self._process.alive():
            with contextlib.suppress(TrackError):
                self._process.call({"op": "close"}, TimeLimit(10.0))
