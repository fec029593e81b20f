"""Decode with libsndfile, through soundfile, in this process."""

from __future__ import annotations

import io
import os
import re
from typing import Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from singerembed import storage
from singerembed.audio.headers import SAMPLE_BYTES, HeaderCheck, check_header
from singerembed.audio.limits import TimeLimit, check_format, check_length
from singerembed.audio.mono import new_mixer
from singerembed.errors import TrackError
from singerembed.model.mel import Pcm

# Sources whose samples int16 holds exactly.
_INT16_SUBTYPES = {"PCM_16", "PCM_S8", "PCM_U8"}
_SYSTEM_ERROR = 2  # libsndfile's number for a failure of read() or seek()
_MAX_SECONDS = 1e6  # libsndfile gives a length near 2**63 samples where a FLAC header leaves it open
# libvorbis was seen to give half a block of wrong samples at the place of a seek; its blocks have up to 8192 samples.
_SEEK_WARMUP_SAMPLES = {"VORBIS": 8192}


class SoundFileReader:
    """libsndfile, in this process. Seeks are exact to the sample."""

    def __init__(
        self, path: str, wanted_rate: int, limit: TimeLimit, within: io.RawIOBase | None = None, *, channels: int = 1
    ) -> None:
        """Open `path`, or a part of it, as mono or stereo. Raises LibsndfileError and TrackError."""
        self._path = path
        self._file = soundfile.SoundFile(within or os.fsencode(path))  # bytes, as names need not be UTF-8
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
        self._channels = channels
        as_is = mono_16_bit and self.sample_rate == wanted_rate and channels == 1
        self._dtype = "int16" if as_is else "float32"
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
        return self._file.format != "FLAC" and self._file.subtype in SAMPLE_BYTES

    def _restart(self, position: int) -> None:
        self._position = position  # of the file
        self._mixer = new_mixer(self._channels, self.sample_rate, position)
        self._rest = self._mixer.nothing

    def read(self, n: int) -> Pcm:
        self._limit.remaining()
        if self._file.channels == self._channels == 1:
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
            got = self._decoded_frames()
            of_system = exc.code == _SYSTEM_ERROR
            code, what = ("unreadable", "reading") if of_system else ("decode_failed", "decoding")
            message = f"{what} failed after {self._seconds(got)}: {exc.error_string}"
            self._failure = TrackError(code, message, passing=of_system)
        if got < n and not self._failure and (error := storage.reading_error(self._path)) is not None:
            message = f"reading failed after {self._seconds(got)}: {error.strerror}"
            self._failure = TrackError("unreadable", message, passing=storage.may_pass(error))
        self._position += got
        return pcm[:got]

    def _decoded_frames(self) -> int:
        """How many frames the read that failed has put into its buffer; 0 where the storage has gone."""
        try:
            return max(0, int(self._file.tell()) - self._position)
        except soundfile.LibsndfileError:
            return 0

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
