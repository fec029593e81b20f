"""Crops for validation: which recordings, and how their pairs are made."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset, Sampler

from singerembed.errors import TrackError
from training.config import TrainConfig
from training.groups import recording_numbers
from training.metrics import CropLabels
from training.reading import draw_crop, warn_once
from training.recordings import Recording

# All pairs of validation crops are compared: 4096 x 4096 similarities take 64 MiB.
MAX_VALIDATION_CROPS = 4096

_log = logging.getLogger(__name__)


class CropDataset(Dataset[dict[str, Any]]):
    """Crops of the validation recordings, not augmented, the same in each epoch."""

    def __init__(self, recordings: Sequence[Recording], config: TrainConfig, seconds: float | None = None) -> None:
        """`seconds`: length of a crop; None for the encoder's."""
        spec = config.front_end()
        self._config = config
        self._sample_rate = spec.sample_rate
        self.n_samples = spec.crop_samples if seconds is None else round(seconds * spec.sample_rate)
        per_recording = config.data.validation_crops
        kept = _drawn_evenly(recordings, MAX_VALIDATION_CROPS // per_recording, config.seed)
        numbers = recording_numbers(kept)
        if len(set(numbers.tolist())) > len({each.singer for each in kept}):
            stretches = [[recording] * per_recording for recording in kept]
        else:  # pairs of one singer are crops of one recording, which must not overlap
            stretches = [_disjoint(recording, per_recording, self.n_samples / self._sample_rate) for recording in kept]
            crops = np.bincount(numbers, [len(of_recording) for of_recording in stretches])
            stretches = [
                of_recording if crops[number] > 1 else []
                for number, of_recording in zip(numbers, stretches, strict=True)
            ]
            short = stretches.count([])
            if short:
                _log.warning("validation: %d of %d recordings are too short for two crops: left out", short, len(kept))
        self._recordings = [stretch for of_recording in stretches for stretch in of_recording]
        singers = {singer: number for number, singer in enumerate(dict.fromkeys(each.singer for each in kept))}
        self.labels = CropLabels(
            singers=np.array([singers[each.singer] for each in self._recordings], np.int64),
            recordings=np.repeat(numbers, [len(of_recording) for of_recording in stretches]),
        )

    def __len__(self) -> int:
        """Return the number of crops."""
        return len(self._recordings)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `clips`, float32 [samples], and `indices`; zeros and -1 for a recording that cannot be used."""
        recording = self._recordings[index]
        rng = np.random.default_rng((self._config.seed, index))
        try:
            pcm, _ = draw_crop(recording, recording.path, self.n_samples, self._sample_rate, self._config, rng)
        except TrackError as exc:
            warn_once(recording.path, f"{exc}; its crops are left out of the validation")
            return {"clips": np.zeros(self.n_samples, np.float32), "indices": -1}
        return {"clips": pcm, "indices": index}


def _drawn_evenly(recordings: Sequence[Recording], count: int, seed: int) -> list[Recording]:
    """Return `count` recordings, all if there are fewer: two of each singer, in random order, before the next two."""
    singers: dict[str, list[int]] = {}
    rng = np.random.default_rng(seed)
    for index in rng.permutation(len(recordings)).tolist():
        singers.setdefault(recordings[index].singer, []).append(index)
    places = [
        (place // 2, number, index)
        for number, of_singer in enumerate(singers.values())
        for place, index in enumerate(of_singer)
    ]
    return [recordings[index] for _, _, index in sorted(sorted(places)[:count], key=lambda place: place[2])]


def _disjoint(recording: Recording, count: int, seconds: float) -> list[Recording]:
    """Return up to `count` equal stretches of a recording, each of at least `seconds`.

    A crop of each overlaps with none of another.
    """
    count = min(count, int(recording.seconds // seconds))
    length = recording.seconds / max(1, count)
    return [replace(recording, start=recording.start + i * length, seconds=length) for i in range(count)]


class ValidationSampler(Sampler[int]):
    """One device's share of the validation crops. All devices get as many; if necessary the first crops repeat."""

    def __init__(self, n_crops: int, rank: int, devices: int) -> None:
        self._n_crops, self._rank, self._devices = n_crops, rank, devices

    def __len__(self) -> int:
        return math.ceil(self._n_crops / self._devices)

    def __iter__(self) -> Iterator[int]:
        for turn in range(len(self)):
            yield (turn * self._devices + self._rank) % self._n_crops
