"""Where crops lie, whatever the length, hop and block."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from singerembed.audio.crops import CropPlan, read_crops, spaced_indices
from singerembed.errors import TrackError
from singerembed.model.mel import Pcm


class ArrayReader:
    """A recording in memory whose samples are 1, 2, 3, ..."""

    def __init__(self, n: int) -> None:
        self._pcm = np.arange(1, n + 1, dtype=np.int16)
        self.sample_rate = 10
        self.notes: list[str] = []
        self._position = 0

    def read(self, n: int) -> Pcm:
        pcm = self._pcm[self._position : self._position + n]
        self._position += len(pcm)
        return pcm

    def seek(self, sample: int) -> None:
        self._position = min(sample, len(self._pcm))

    def length(self) -> int:
        return len(self._pcm)

    def check_complete(self) -> None: ...
    def close(self) -> None: ...


def crops_of(reader: ArrayReader, plan: CropPlan, block: int) -> list[tuple[int, int, int, list[int]]]:
    return [
        (index, int(start), int(stop), pcm.tolist())
        for part in read_crops(reader, plan, block)
        for index, start, stop, pcm in zip(part.index, part.start, part.stop, part.pcm, strict=True)
    ]


def expected(n: int, plan: CropPlan) -> list[tuple[int, int, int, list[int]]]:
    """By definition, one crop at a time."""
    stop = n if plan.stop is None else min(n, plan.stop)
    samples = list(range(plan.start + 1, stop + 1))
    if len(samples) < plan.crop_samples:
        padded = samples + [0] * (plan.crop_samples - len(samples))
        return [(0, plan.start, plan.start + len(samples), padded)]
    found, i = [], 0
    while i * plan.hop_samples + plan.crop_samples <= len(samples):
        first = i * plan.hop_samples
        crop = samples[first : first + plan.crop_samples]
        found.append((i, plan.start + first, plan.start + first + plan.crop_samples, crop))
        i += 1
    return found


@settings(max_examples=400, deadline=None)
@given(
    n=st.integers(1, 200),
    crop=st.integers(1, 30),
    hop=st.integers(1, 40),
    block=st.integers(1, 5),
    start=st.integers(0, 50),
    length=st.one_of(st.none(), st.integers(1, 100)),
)
def test_consecutive_crops(n: int, crop: int, hop: int, block: int, start: int, length: int | None) -> None:
    plan = CropPlan(crop, hop, None, start, None if length is None else start + length)
    if start >= n:
        with pytest.raises(TrackError, match="no audio after its start"):
            crops_of(ArrayReader(n), plan, block)
        return
    assert crops_of(ArrayReader(n), plan, block) == expected(n, plan)


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 200), crop=st.integers(1, 30), hop=st.integers(1, 40), count=st.integers(1, 12))
def test_spaced_crops_are_some_of_the_consecutive_ones(n: int, crop: int, hop: int, count: int) -> None:
    plan = CropPlan(crop, hop, count)
    found = crops_of(ArrayReader(n), plan, 4)
    everything = expected(n, plan)
    assert found == [everything[i] for i in spaced_indices(len(everything), count)]


@given(st.integers(1, 10_000), st.integers(1, 100))
def test_spaced_indices(n_crops: int, count: int) -> None:
    indices = spaced_indices(n_crops, count)
    assert len(indices) == min(n_crops, count)
    assert indices == sorted(set(indices))
    assert indices[0] >= 0
    assert indices[-1] < n_crops
    gaps = np.diff(indices)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_crops_without_overlap_are_views(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = ArrayReader(100)
    (first, *_) = read_crops(reader, CropPlan(10, 10, None), 4)
    assert np.shares_memory(first.pcm, reader._pcm)


def test_an_empty_recording_is_said() -> None:
    with pytest.raises(TrackError, match="no samples"):
        crops_of(ArrayReader(0), CropPlan(10, 10, None), 4)
