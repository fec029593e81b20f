"""Decode with FFmpeg, through PyAV, to the real end of a recording.

Meant for the decoder process (worker.py): FFmpeg's many demuxers meet many strange files, and may crash on one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from numpy.typing import NDArray

from singerembed import storage
from singerembed.audio.limits import check_format, check_length
from singerembed.audio.mono import MonoMixer, StereoMixer, new_mixer
from singerembed.errors import TrackError

_SKIP_SAMPLES = 1 << 20
# Decoded before the place of a seek and dropped: MP3 frames refer to bits of up to 9 frames before, transforms overlap.
_PREROLL_SECONDS = 0.5
# Their duration is counted, not estimated from a bit rate, so that less audio means a file that was cut.
_COUNTED_FORMATS = {"mov,mp4,m4a,3gp,3g2,mj2", "asf", "matroska,webm", "flac", "wav", "aiff", "caf", "wv", "tta", "ape"}
# Codecs whose frames all have one length: the place of a frame follows from a rounded time stamp.
_CONSTANT_FRAMES = {"aac", "ac3", "eac3", "alac", "mp2", "mp3", "opus", "flac"}
_MAX_SILENCE_SECONDS = 1.0  # for one damaged packet
_NOTED_SECONDS = 0.1  # by which a header may be off without a word
_MAX_DAMAGED_SHARE = 0.1  # of the packets; beyond it a recording is not decoded but guessed


class AvReader:
    """FFmpeg through PyAV: one open file, decoded frame by frame. A `PcmReader`.

    Silence stands for a damaged packet, so that what follows keeps its place, and the packet is noted. Pieces of
    another rate or channel layout are resampled to the rate of the first piece.
    """

    def __init__(
        self, path: str, header_seconds: float | None = None, promised_seconds: float = 0.0, *, channels: int = 1
    ) -> None:
        """Open `path` as mono or stereo. Raises TrackError, FFmpegError and OSError.

        `header_seconds`: the length in the header as another decoder reads it, 0 if the header leaves it open.
        `promised_seconds`: a length below which the file counts as cut.
        """
        self._path, self._channels = path, channels
        self._header_seconds, self._promised_seconds = header_seconds, promised_seconds
        self._length: int | None = None
        self._rising: bool | None = None  # time stamps rise through the whole file; None: not known yet
        self.notes: list[str] = []
        self._open()

    def _open(self) -> None:
        self._container = opened(self._path)
        stream: Any = self._container.streams.best("audio")
        if stream is None:
            self._container.close()
            raise TrackError("no_audio", "the file has no audio stream")
        self._stream = stream
        self.sample_rate: int = stream.rate
        check_format(self.sample_rate, stream.channels)
        self._packets = self._damaged = 0
        self._restart(0)

    def _restart(self, position: int) -> None:
        """Begin to read at sample `position`, which the decoder stands at."""
        mixer = new_mixer(self._channels, self.sample_rate, position)
        self._chunks = self._mixed(self._frames(), mixer)
        self._rest: NDArray[np.float32] = mixer.nothing
        self._position = position

    # --- reading ----------------------------------------------------------------------------------------------------

    def _frames(self) -> Iterator[Any]:
        """Decode frames from where the container stands; silence of their length stands for damaged packets."""
        last = None
        for packet in self._container.demux(self._stream):
            self._packets += 1
            try:
                for frame in packet.decode():
                    last = frame
                    yield frame
            except av.error.InvalidDataError:
                self._damaged += 1
                if last is not None and packet.duration and packet.time_base:
                    seconds = min(_MAX_SILENCE_SECONDS, float(packet.duration * packet.time_base))
                    yield _silence(last, round(seconds * last.sample_rate))

    def _mixed(self, frames: Iterator[Any], mixer: MonoMixer | StereoMixer) -> Iterator[NDArray[np.float32]]:
        resampler, layout = None, None
        for frame in frames:
            if layout != (frame.format.name, frame.layout.name, frame.sample_rate):
                if resampler is not None:
                    yield from self._converted(resampler, None, mixer)
                    self._note("its format changes within the file")
                layout = (frame.format.name, frame.layout.name, frame.sample_rate)
                check_format(frame.sample_rate, frame.layout.nb_channels)
                resampler = av.AudioResampler(format="flt", layout=frame.layout, rate=self.sample_rate)
            frame.pts = None  # a gap in the time stamps is no silence
            yield from self._converted(resampler, frame, mixer)
        if resampler is not None and layout is not None and layout[2] != self.sample_rate:
            yield from self._converted(resampler, None, mixer)
        yield mixer.flush()
        if mixer.note:
            self._note(mixer.note)

    @staticmethod
    def _converted(resampler: Any, frame: Any, mixer: MonoMixer | StereoMixer) -> Iterator[NDArray[np.float32]]:
        for packed in resampler.resample(frame):
            interleaved = packed.to_ndarray().reshape(-1, packed.layout.nb_channels)
            yield mixer.mix(np.ascontiguousarray(interleaved, np.float32))

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def read(self, n: int) -> NDArray[np.float32]:
        """See `PcmReader.read`."""
        chunks, have = [self._rest], len(self._rest)
        while have < n and (chunk := next(self._chunks, None)) is not None:
            chunks.append(chunk)
            have += len(chunk)
        joined = np.concatenate(chunks)
        self._rest = joined[n:]
        self._position += min(n, have)
        return joined[:n]

    def check_complete(self) -> None:
        """See `PcmReader.check_complete`."""
        if self._damaged:
            self._note(f"{self._damaged} of {self._packets} packets could not be decoded; silence stands for them")
            if self._damaged > _MAX_DAMAGED_SHARE * self._packets:
                raise TrackError("decode_failed", f"{self._damaged} of {self._packets} packets could not be decoded")
        seconds = self._position / self.sample_rate
        if self._header_seconds == 0:
            self._note(f"its header does not say how long it is; it holds {seconds:.1f} s")
        elif self._header_seconds and abs(self._header_seconds - seconds) > _NOTED_SECONDS:
            self._note(f"its header says {self._header_seconds:.1f} s, and it holds {seconds:.1f} s")
        promised = self._promised_seconds
        if self._container.format.name in _COUNTED_FORMATS and self._stream.duration and self._stream.time_base:
            promised = max(promised, float(self._stream.duration * self._stream.time_base))
        check_length(round(promised * self.sample_rate), self._position, self.sample_rate)

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    # --- seeking ----------------------------------------------------------------------------------------------------

    def seek(self, sample: int) -> None:
        """Go to `sample`: by time stamps where they tell the place exactly, else by decoding all that lies before."""
        ahead = sample - self._position
        if not 0 <= ahead <= 2 * _PREROLL_SECONDS * self.sample_rate and self._seek_by_time_stamp(sample):
            return
        if sample < self._position:
            self.close()
            self._open()
        while self._position < sample and len(self.read(min(_SKIP_SAMPLES, sample - self._position))):
            pass

    def _seek_by_time_stamp(self, sample: int) -> bool:
        """Go to `sample` by the container's index; return whether that was possible."""
        target = sample - round(_PREROLL_SECONDS * self.sample_rate)
        if target <= 0 or not self._time_stamps_rise():
            return False
        clock = self._clock
        if clock is None:
            return False
        try:
            self._container.seek(clock.time_stamp(target), stream=self._stream, backward=True)
        except (av.error.FFmpegError, OSError):
            return False
        damaged = self._damaged
        frames = self._frames()
        first = next(frames, None)
        position = None if first is None else clock.sample(first)
        self._damaged = damaged  # a decoder that starts in the middle may not use its first packets
        if first is None or position is None or position > sample:
            self._container.close()
            self._open()
            return False
        self._restart(position)
        self._chunks = self._mixed(_chain(first, frames), new_mixer(self._channels, self.sample_rate, position))
        while self._position < sample and len(self.read(sample - self._position)):
            pass
        return True

    @cached_property
    def _clock(self) -> _Clock | None:
        return _Clock.of(self._path)

    def length(self) -> int:
        """Number of samples, from the packets and not from a header: where the last decoded sample lies."""
        if self._length is None:
            self._length = self._length_by_time_stamps() or self._length_by_decoding()
        return self._length

    def _length_by_time_stamps(self) -> int:
        clock = self._clock if self._time_stamps_rise() else None
        if clock is None:
            return 0
        with contextlib.closing(AvReader(self._path)) as tail:
            try:
                tail._container.seek(self._last_time_stamp, stream=tail._stream, backward=True)
                ends = [(clock.sample(frame), frame.samples) for frame in tail._frames()]
            except (av.error.FFmpegError, OSError):
                return 0
        return ends[-1][0] + ends[-1][1] if ends and ends[-1][0] is not None else 0

    def _length_by_decoding(self) -> int:
        with contextlib.closing(AvReader(self._path)) as whole:
            while len(whole.read(_SKIP_SAMPLES)):
                pass
            return whole._position

    def _time_stamps_rise(self) -> bool:
        """Whether time stamps can be used to find a place: each packet begins where the one before it ends.

        An index that reaches to the end of the file saves reading all packets.
        """
        if self._rising is None:
            self._rising = self._look_at_time_stamps()
        return self._rising

    def _look_at_time_stamps(self) -> bool:
        index = self._stream.index_entries
        if self._container.format.name.startswith("mov") and len(index):
            self._last_time_stamp = index[len(index) - 1].timestamp
            return True
        tolerance = (self._stream.time_base or Fraction(1)) ** -1 / 10  # a tenth of a second, in its unit
        expected: int | None = None
        with contextlib.closing(opened(self._path)) as container:
            stream = container.streams.best("audio")
            for packet in container.demux(stream):
                if packet.size == 0:
                    continue
                if packet.pts is None or not packet.duration:
                    return False
                if expected is not None and abs(packet.pts - expected) > tolerance:
                    return False
                expected = packet.pts + packet.duration
                self._last_time_stamp = packet.pts
        return expected is not None


class _Clock:
    """Converts between time stamps and samples of one recording, counted from its first decoded sample."""

    def __init__(self, first: Any, second: Any, codec: str) -> None:
        self._base = first.time_base * first.sample_rate  # samples a unit
        self._zero = first.pts
        self._n_first, self._n = first.samples, second.samples
        self._exact = (1 / self._base).denominator == 1  # a whole number of units a sample
        self._constant = codec in _CONSTANT_FRAMES

    @classmethod
    def of(cls, path: str) -> _Clock | None:
        """Look at the first two frames; None where they have no time stamps that tell the place of a sample."""
        with contextlib.closing(AvReader(path)) as start:
            frames = start._frames()
            first, second = next(frames, None), next(frames, None)
            if first is None or second is None or first.pts is None or first.time_base is None:
                return None
            codec = start._stream.codec_context.name
            clock = cls(first, second, codec.removesuffix("float"))
        # The WAV demuxer guesses the place of blocks of ADPCM.
        if codec.startswith("adpcm"):
            return None
        return clock if clock._exact or clock._constant else None

    def time_stamp(self, sample: int) -> int:
        """The time stamp of `sample`, rounded down."""
        return int(self._zero + sample / self._base)

    def sample(self, frame: Any) -> int | None:
        """The first sample of `frame`; None where it cannot be told."""
        if frame.pts is None:
            return None
        place: Fraction = (frame.pts - self._zero) * self._base
        if self._exact:
            return round(place)
        number = round((place - self._n_first) / self._n)
        snapped = self._n_first + number * self._n
        return snapped if number >= 0 and abs(snapped - place) <= self._n / 4 else None


def opened(path: str) -> Any:
    """Open `path`; PyAV takes names that are UTF-8 only, and a file object for others."""
    source: Any = path if storage.is_utf8(path) else Path(path).open("rb")  # noqa: SIM115  (closed with the container)
    return av.open(source, metadata_errors="ignore")


def _silence(like: Any, n: int) -> Any:
    """A frame of `n` samples of silence in the format of the frame `like`."""
    frame = av.AudioFrame(like.format.name, like.layout.name, n)
    for plane in frame.planes:
        plane.update(bytes(plane.buffer_size))
    frame.sample_rate = like.sample_rate
    return frame


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
