"""Open a recording as mono PCM: choose the decoder, mix down, resample.

soundfile decodes what it can, in this process. What it cannot open goes to PyAV in a decoder process (process.py),
because FFmpeg's many demuxers meet many strange files, and a crash or a hang there must cost one track only. A
recording that was being decoded when an earlier run died is decoded there whatever its format.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from singerembed import storage
from singerembed.audio.headers import HeaderCheck, check_header
from singerembed.audio.limits import TimeLimit, check_format, check_length
from singerembed.audio.mono import MonoMixer
from singerembed.audio.process import ProcessReader
from singerembed.errors import MissingDependencyError, TrackError
from singerembed.model.mel import Pcm

Result = TypeVar("Result")

# Sources whose samples int16 holds exactly.
_INT16_SUBTYPES = {"PCM_16", "PCM_S8", "PCM_U8"}
# soxr's HQ filter is a few hundred input samples long; a warm-up of this length leaves no trace of the cut.
_RESAMPLER_WARMUP_SECONDS = 0.1
_READ_SECONDS = 4.0
_FIRST_PAUSE_SECONDS = 0.5
_MAX_SECONDS = 1e6  # libsndfile gives a length near 2**63 samples where a FLAC header leaves it open
# libvorbis was seen to give half a block of wrong samples at the place of a seek; its blocks have up to 8192 samples.
_SEEK_WARMUP_SAMPLES = {"VORBIS": 8192}


class PcmReader(Protocol):
    """A mono recording that is read from front to back, with seeking."""

    sample_rate: int  # Hz

    @property
    def notes(self) -> list[str]:
        """What a person should know of the file, although it was decoded."""
        ...

    def read(self, n: int) -> Pcm:
        """Return the next `n` samples, fewer only at the end. Raises TrackError."""
        ...

    def seek(self, sample: int) -> None:
        """Go to `sample`, counted from the beginning of the recording; past the end, nothing is left to read."""
        ...

    def length(self) -> int:
        """Number of samples from the beginning to the end, whatever the header says; may read the whole file."""
        ...

    def check_complete(self) -> None:
        """After everything was read: raise TrackError if the file broke off, or promised more than there was."""
        ...

    def close(self) -> None: ...


@contextlib.contextmanager
def open_recording(
    location: str, sample_rate: int, limit: TimeLimit, *, isolated: bool = False, retries: int = 0
) -> Iterator[PcmReader]:
    """Open the recording at `location`, a local path or a URI, as mono at `sample_rate` Hz.

    `isolated`: decode in another process whatever the format is. `retries`: how often a file system's passing trouble
    is waited out. Raises TrackError with code not_found, unreadable, no_audio, unsupported, decode_failed,
    decoder_crashed or decode_timeout.
    """
    with _local_copy(location, retries) as path:
        try:
            _patiently(lambda: _check_file(path), retries)
        except OSError as exc:
            raise TrackError("unreadable", _reason(exc)) from exc
        source: PcmReader
        if isolated:
            source = ProcessReader(path, "any", limit)
        else:
            source = open_source(path, sample_rate, limit, partial(ProcessReader, path, "av", limit))
        with contextlib.closing(source):
            yield source if source.sample_rate == sample_rate else _ResamplingReader(source, sample_rate)


def open_source(
    path: str, wanted_rate: int, limit: TimeLimit, open_av: Callable[[float | None, float], PcmReader]
) -> PcmReader:
    """Open the local file `path` with the decoder that reads it to its end.

    libsndfile, unless it cannot open the file or the length it would stop at is not borne out by the file (headers.py).
    Then FFmpeg, if it opens the file and reads at least as far: `open_av` takes the seconds that the header says (0: it
    does not say) and the seconds that are promised. Raises TrackError and OSError.
    """
    try:
        source = SoundFileReader(path, wanted_rate, limit)
    except soundfile.LibsndfileError:
        return open_av(None, 0.0)
    with contextlib.ExitStack() as stack:
        stack.callback(source.close)
        header = source.check_header()
        if header.believed:
            stack.pop_all()
            return source
        try:
            other = open_av(source.header_seconds, header.promised_seconds)
        except TrackError:  # FFmpeg does not know it
            stack.pop_all()
            return source
        if source.length_is_measured and other.length() <= source.length():
            other.close()
            stack.pop_all()
            return source
        return other


@contextlib.contextmanager
def _local_copy(location: str, retries: int) -> Iterator[str]:
    with contextlib.ExitStack() as stack:
        try:
            path = _patiently(lambda: stack.enter_context(storage.local_copy(location)), retries)
        except FileNotFoundError as exc:
            raise TrackError("not_found", "file not found") from exc
        except MissingDependencyError:
            raise
        except Exception as exc:  # each fsspec file system has exceptions of its own
            raise TrackError("unreadable", _reason(exc)) from exc
        yield path


def _patiently(call: Callable[[], Result], retries: int) -> Result:
    """The result of `call`; trouble that may pass by itself is waited out, `retries` times, twice as long each time."""
    for attempt in range(retries):
        try:
            return call()
        except (FileNotFoundError, PermissionError, IsADirectoryError, MissingDependencyError, TrackError):
            raise
        except Exception:  # as above
            time.sleep(_FIRST_PAUSE_SECONDS * 2**attempt)
    return call()


def _check_file(path: str) -> None:
    """Raise TrackError unless `path` is a file with something in it; OSError where trying again may help."""
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
    except (PermissionError, ValueError) as exc:  # ValueError: a NUL in the name
        raise TrackError("unreadable", _reason(exc)) from exc
    if info.st_size == 0:
        raise TrackError("no_audio", "the file is empty")


def _reason(exc: Exception) -> str:
    return os.strerror(exc.errno) if isinstance(exc, OSError) and exc.errno else storage.scrubbed(str(exc))


# --- soundfile ------------------------------------------------------------------------------------------------------


class SoundFileReader:
    """libsndfile, in this process. Seeks are exact to the sample."""

    def __init__(self, path: str, wanted_rate: int, limit: TimeLimit) -> None:
        self._path = path
        self._file = soundfile.SoundFile(path)
        self._limit = limit
        self._failure: TrackError | None = None
        self.sample_rate = self._file.samplerate
        self.notes: list[str] = []
        try:
            check_format(self.sample_rate, self._file.channels)
        except TrackError:
            self._file.close()
            raise
        mono_16_bit = self._file.channels == 1 and self._file.subtype in _INT16_SUBTYPES
        self._dtype = "int16" if mono_16_bit and self.sample_rate == wanted_rate else "float32"
        self._restart(0)

    def check_header(self) -> HeaderCheck:
        """Say whether the file bears out the length that libsndfile finds."""
        return check_header(self._path, self._file.format, self._file.subtype, self._file.channels, self._file.frames)

    @property
    def header_seconds(self) -> float:
        """The length that libsndfile finds, in seconds; 0 where the header leaves it open."""
        seconds = self._file.frames / self.sample_rate
        return seconds if seconds < _MAX_SECONDS else 0.0

    @property
    def length_is_measured(self) -> bool:
        """Whether libsndfile found the length by the size of the file, and not by a header or a guess."""
        return self._file.format not in {"MP3", "FLAC", "OGG"}

    def _restart(self, position: int) -> None:
        self._position = position  # of the file
        self._mixer = MonoMixer(self.sample_rate, position)
        self._rest = np.empty(0, np.float32)

    def read(self, n: int) -> Pcm:
        self._limit.remaining()
        if self._file.channels == 1:
            mono: Pcm = self._read_frames(n)[:, 0]
            return mono
        parts, have = [self._rest], len(self._rest)
        while have < n:
            wanted = max(n - have, self._mixer.segment)
            frames = self._read_frames(wanted)
            parts.append(self._mixer.mix(frames))
            have += len(parts[-1])
            if len(frames) < wanted:
                parts.append(self._mixer.flush())
                break
        joined: NDArray[np.float32]
        joined = parts[1] if len(parts) == 2 and not len(parts[0]) else np.concatenate(parts)
        self._rest = joined[n:]
        self.notes = [self._mixer.note] if self._mixer.note else []
        return joined[:n]

    def _read_frames(self, n: int) -> Any:
        """The next `n` frames, [n, channels], fewer at the end or where decoding fails."""
        if self._failure:
            raise self._failure
        # A buffer as large as what is left, not as what is asked for.
        n = min(n, max(0, self._file.frames - self._position))
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
        return pcm[:got]

    def seek(self, sample: int) -> None:
        sample = min(sample, self._file.frames)
        # Channels are mixed by whole segments.
        position = sample if self._file.channels == 1 else sample - sample % self._mixer.segment
        warmup = min(position, _SEEK_WARMUP_SAMPLES.get(self._file.subtype, 0))
        try:
            self._file.seek(position - warmup)
            self._file.read(warmup, dtype="float32")
        except soundfile.LibsndfileError as exc:
            raise TrackError(
                "decode_failed", f"seeking to {sample / self.sample_rate:.1f} s failed: {exc.error_string}"
            ) from exc
        self._restart(position)
        self.read(sample - position)

    def length(self) -> int:
        return int(self._file.frames)

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
        check_length(self._file.frames, self._position, self.sample_rate)

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
        self._restart()

    @property
    def notes(self) -> list[str]:
        return self._source.notes

    def length(self) -> int:
        return round(self._source.length() * self.sample_rate / self._source.sample_rate)

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
