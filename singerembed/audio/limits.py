"""Limits of what is decoded: time, channels, sample rate, and the length that a header promises."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from singerembed.errors import TrackError

DEFAULT_TRACK_TIMEOUT_SECONDS = 600.0
# Beyond these a header is damaged or hostile: no singer was recorded so.
MAX_CHANNELS = 64
# The highest is DSD512 as FFmpeg gives it: a sample for each 8 bits.
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1_000, 2_822_400  # Hz
# How far decoding may end before the length that the header promises: encoder delay and padding are trimmed by some.
_SHORTFALL_SECONDS = 0.5


class TimeLimit:
    """Limits the seconds that decoding one track may take; time spent elsewhere, as in the encoder, does not count."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._left = seconds
        self._started: float | None = None

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Within this block the clock runs; a block within another counts once."""
        if self._started is not None:
            yield
            return
        self._started = time.monotonic()
        try:
            yield
        finally:
            self._left -= time.monotonic() - self._started
            self._started = None

    def remaining(self) -> float:
        """Seconds left; raises TrackError once there are none."""
        left = self._left - self.running_seconds()
        if left <= 0:
            raise self.exceeded()
        return left

    def exceeded(self) -> TrackError:
        """The error of a track that has used up its time."""
        return TrackError("decode_timeout", f"decoding took longer than {self._seconds:g} s (--track-timeout)")

    def running_seconds(self) -> float:
        """Seconds since the clock was started; 0 while it stands. For other threads too."""
        started = self._started
        return 0.0 if started is None else time.monotonic() - started

    def overdue_seconds(self) -> float:
        """Seconds by which a running clock is beyond the limit; 0 while it stands. For other threads too."""
        running = self.running_seconds()
        return max(0.0, running - self._left) if running else 0.0


def check_format(sample_rate: int, channels: int) -> None:
    if not MIN_SAMPLE_RATE <= sample_rate <= MAX_SAMPLE_RATE:
        raise TrackError(
            "unsupported", f"sample rate {sample_rate} Hz is outside {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE}"
        )
    if not 1 <= channels <= MAX_CHANNELS:
        raise TrackError("unsupported", f"{channels} channels; at most {MAX_CHANNELS} are read")


def check_length(promised: int, read: int, sample_rate: int) -> None:
    if promised - read > _SHORTFALL_SECONDS * sample_rate:
        raise TrackError(
            "truncated",
            f"the header promises {promised / sample_rate:.1f} s, decoding ended at {read / sample_rate:.1f} s",
        )
