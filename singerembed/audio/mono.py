"""Mix channels down to mono or stereo, in stretches that do not depend on how a recording is read."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed.model.mel import mix_down

_SEGMENTS_A_SECOND = 10


def new_mixer(channels: int, sample_rate: int, position: int = 0) -> MonoMixer | StereoMixer:
    """Return the mixer to `channels` channels, 1 or 2; `position`: the first sample that will come."""
    return MonoMixer(sample_rate, position) if channels == 1 else StereoMixer(sample_rate, position)


def segment_samples(sample_rate: int) -> int:
    """Samples of a stretch in which one decision is made on how to mix."""
    return max(1, sample_rate // _SEGMENTS_A_SECOND)


class MonoMixer:
    """Mixes a recording down as it is read, from front to back.

    Where the channels cancel, as with a microphone wired the wrong way round, the loudest channel is taken instead of
    the mean. That is decided for each tenth of a second from the recording's beginning, so that it does not depend on
    where reading started: samples wait until their tenth is complete.
    """

    nothing = np.empty(0, np.float32)

    def __init__(self, sample_rate: int, position: int = 0) -> None:
        """`position`: the first sample that will come; after a seek it may lie within a segment."""
        self.segment = segment_samples(sample_rate)
        self._to_boundary = -position % self.segment
        self._waiting: list[NDArray[np.float32]] = []
        self._n_waiting = 0
        self._cancelled = self._segments = 0

    @property
    def note(self) -> str:
        """What there is to say about the channels; empty: nothing."""
        if not self._cancelled:
            return ""
        share = f"{self._cancelled / max(1, self._segments):.0%}"
        return f"the channels cancel in {share} of what was read; the loudest one is used there"

    def mix(self, pcm: NDArray[np.float32]) -> NDArray[np.float32]:
        """Take more samples, float32 [n, channels]; return mono samples that are ready, float32 [m]."""
        if pcm.shape[1] == 1:
            return pcm[:, 0]
        if self._waiting and self._waiting[0].shape[1] != pcm.shape[1]:  # a chained stream with other channels
            return np.concatenate([self.flush(), self.mix(pcm)])
        self._waiting.append(pcm)
        self._n_waiting += len(pcm)
        ready = self._n_waiting - (self._n_waiting - self._to_boundary) % self.segment
        if self._n_waiting < self._to_boundary or ready <= 0:
            return np.empty(0, np.float32)
        joined = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting)
        self._waiting, self._n_waiting = [joined[ready:]], self._n_waiting - ready
        return self._mixed(joined[:ready])

    def flush(self) -> NDArray[np.float32]:
        """Return the mono samples of the incomplete segment at the end."""
        joined = np.concatenate(self._waiting) if self._waiting else None
        self._waiting, self._n_waiting = [], 0
        return np.empty(0, np.float32) if joined is None or not len(joined) else self._mixed(joined)

    def _mixed(self, pcm: NDArray[np.float32]) -> NDArray[np.float32]:
        parts: list[Any] = []
        if self._to_boundary:
            head, pcm = pcm[: self._to_boundary], pcm[self._to_boundary :]
            parts.append(self._mix_segments(head))
            self._to_boundary = 0
        if len(pcm) or not parts:
            parts.append(self._mix_segments(pcm))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _mix_segments(self, pcm: NDArray[np.float32]) -> NDArray[np.float32]:
        mono, cancelled = mix_down(pcm, self.segment)
        self._cancelled += cancelled
        self._segments += -(-len(pcm) // self.segment)
        return mono


class StereoMixer:
    """Leaves two channels as they are; doubles one, and what `MonoMixer` makes of more than two."""

    nothing = np.empty((0, 2), np.float32)

    def __init__(self, sample_rate: int, position: int = 0) -> None:
        """See `MonoMixer`."""
        self._mono = MonoMixer(sample_rate, position)
        self.segment = self._mono.segment

    @property
    def note(self) -> str:
        """See `MonoMixer`."""
        return self._mono.note

    def mix(self, pcm: NDArray[np.float32]) -> NDArray[np.float32]:
        """Take more samples, float32 [n, channels]; return stereo samples that are ready, float32 [m, 2]."""
        if pcm.shape[1] != 2:
            return _doubled(self._mono.mix(pcm))
        waiting = self.flush()  # of a stream before, with other channels
        return np.concatenate([waiting, pcm]) if len(waiting) else pcm

    def flush(self) -> NDArray[np.float32]:
        """Return the stereo samples of the incomplete segment at the end."""
        return _doubled(self._mono.flush())


def _doubled(mono: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.repeat(mono[:, np.newaxis], 2, axis=1)
