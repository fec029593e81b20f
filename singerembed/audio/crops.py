"""Plan where the crops of a recording lie, and read them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from singerembed.audio.reader import PcmReader
from singerembed.errors import TrackError
from singerembed.model.mel import Pcm


@dataclass(frozen=True)
class CropPlan:
    """Which crops of a recording are wanted. Lengths are in samples; intervals are [start, stop)."""

    crop_samples: int
    hop_samples: int  # from the start of one crop to the start of the next
    count: int | None  # None: all consecutive ones; otherwise this many of those, evenly spaced
    start: int = 0
    stop: int | None = None  # None: the recording's end

    def n_crops(self, n_samples: int) -> int:
        """How many consecutive crops a stretch of `n_samples` holds: at least one, which is padded if need be."""
        return max(0, n_samples - self.crop_samples) // self.hop_samples + 1


@dataclass(frozen=True)
class CropBlock:
    """Crops that are embedded together."""

    pcm: Pcm  # [n, crop_samples], or [n, crop_samples, 2] of a stereo recording; C-contiguous
    index: list[int]  # of each crop, counting all consecutive crops from the plan's start
    start: NDArray[np.int64]  # [n], samples from the beginning of the recording
    stop: NDArray[np.int64]  # [n]; before start + crop_samples where the crop was padded


def read_crops(
    reader: PcmReader, plan: CropPlan, block: int, choose: Callable[[int], Iterable[int]] | None = None
) -> Iterator[CropBlock]:
    """Read the crops of `plan`, up to `block` at a time.

    `choose`: gives the indices of the wanted crops, of the number that there are, and may look at the crops yielded so
    far between two of them; by default those of `spaced_indices`. For a plan with a count.

    A stretch shorter than a crop gives one crop, padded with zeros at the end as the official code does; a remainder
    after the last whole crop is dropped. Raises TrackError, no_audio where there is nothing to cut.
    """
    if plan.start:
        reader.seek(plan.start)
    if plan.count is None:
        yield from _consecutive(reader, plan, block)
    else:
        count = plan.count
        yield from _spaced(reader, plan, choose or (lambda n_crops: spaced_indices(n_crops, count)))


def spaced_indices(n_crops: int, count: int) -> list[int]:
    """`count` of `n_crops` indices, evenly spaced: the middles of equal stretches; all of them if there are fewer."""
    if count >= n_crops:
        return list(range(n_crops))
    return [(2 * i + 1) * n_crops // (2 * count) for i in range(count)]


def _consecutive(reader: PcmReader, plan: CropPlan, block: int) -> Iterator[CropBlock]:
    first, held = 0, _nothing(reader)  # `held` begins with crop `first`
    limit = None if plan.stop is None else plan.stop - plan.start
    while True:
        position = first * plan.hop_samples
        want = (block - 1) * plan.hop_samples + plan.crop_samples
        want = want if limit is None else min(want, limit - position)
        pcm = _joined(held, reader.read(max(0, want - len(held))))
        if len(pcm) < plan.crop_samples:
            if first == 0:
                yield _padded(pcm, plan)
            return
        n = plan.n_crops(len(pcm))
        yield _block(pcm, list(range(first, first + n)), plan)
        first += n
        held = pcm[n * plan.hop_samples :]
        if n * plan.hop_samples > len(pcm):  # crops that do not touch: what lies between is read and dropped
            skipped = n * plan.hop_samples - len(pcm)
            if len(reader.read(skipped)) < skipped:
                return
        if n < block:
            return


def _spaced(reader: PcmReader, plan: CropPlan, choose: Callable[[int], Iterable[int]]) -> Iterator[CropBlock]:
    stop = reader.length() if plan.stop is None else min(plan.stop, reader.length())
    for index in choose(plan.n_crops(stop - plan.start)):
        position = index * plan.hop_samples
        reader.seek(plan.start + position)
        pcm = reader.read(min(plan.crop_samples, max(0, stop - plan.start - position)))
        if len(pcm) == plan.crop_samples:
            yield _block(pcm, [index], plan)
        elif index == 0:
            yield _padded(pcm, plan)
        # else time stamps were rounded, and the last crop lies beyond the end


def _nothing(reader: PcmReader) -> Pcm:
    return reader.read(0)


def _joined(held: Pcm, more: Pcm) -> Pcm:
    if len(held) == 0:
        return more
    return np.concatenate([held, more])


def _block(pcm: Pcm, index: list[int], plan: CropPlan) -> CropBlock:
    if plan.hop_samples == plan.crop_samples:
        crops: Any = pcm[: len(index) * plan.crop_samples].reshape(len(index), plan.crop_samples, *pcm.shape[1:])
    else:
        windows: Any = np.lib.stride_tricks.sliding_window_view(pcm, plan.crop_samples, axis=0)
        crops = np.moveaxis(windows[:: plan.hop_samples][: len(index)], -1, 1)
    start = plan.start + np.asarray(index, np.int64) * plan.hop_samples
    return CropBlock(np.ascontiguousarray(crops), index, start, start + plan.crop_samples)


def _padded(pcm: Pcm, plan: CropPlan) -> CropBlock:
    if len(pcm) == 0:
        raise TrackError(
            "no_audio", "there is no audio after its start" if plan.start else "the recording has no samples"
        )
    crop = np.zeros((1, plan.crop_samples, *pcm.shape[1:]), pcm.dtype)
    crop[0, : len(pcm)] = pcm
    start = np.array([plan.start], np.int64)
    return CropBlock(crop, [0], start, start + len(pcm))
