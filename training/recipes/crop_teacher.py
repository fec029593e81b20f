"""Asks the teacher about every crop of a training, as the encoder hears it: for a GPU, which has the time.

A recording can then be played at any speed, which makes another voice of it, and its target stays true.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from singerembed.errors import UsageError
from singerembed.evaluation.baselines.campplus import EMBEDDING_DIM, SAMPLE_RATE, load_campplus
from training import teacher
from training.targets import Targets


class CropTeacher:
    """CAM++ on a device, with the centring and half whitening of a table of targets."""

    sample_rate = SAMPLE_RATE

    def __init__(self, targets: Targets, device: torch.device) -> None:
        """Raises UsageError if `targets` are not CAM++'s, and MissingDependencyError without its weights."""
        if targets.dim != 2 * EMBEDDING_DIM:
            raise UsageError(
                f"the table has targets of {targets.dim} dimensions, and CAM++ gives {2 * EMBEDDING_DIM}. Make it with "
                "python -m training.teacher --teacher campplus"
            )
        self._model = load_campplus().to(device)
        self._device = device
        self._mean, self._whitening = (
            torch.from_numpy(each.astype(np.float32)).to(device) for each in (targets.mean, targets.whitening)
        )

    @torch.no_grad()
    def __call__(self, pcm: Tensor) -> Tensor:
        """Return the targets of crops, [n, dim] of length 1, from `pcm` at 16 kHz, [n, samples] with a peak of 1."""
        features = self._model.features(teacher.PEAK * pcm)
        with torch.autocast(self._device.type, torch.float16, enabled=self._device.type == "cuda"):
            embedding = self._model.xvector(self._model.head(features)).float()
        centred = teacher.both_signs(embedding) - self._mean
        return torch.nn.functional.normalize(centred @ self._whitening, dim=1)


def resampled(pcm: Tensor, samples: int) -> Tensor:
    """Return each row of `pcm` as `samples` samples of the same signal, taken to be periodic."""
    spectrum = torch.fft.rfft(pcm)[:, : samples // 2 + 1]
    played: Tensor = torch.fft.irfft(spectrum, samples)
    return played * (samples / pcm.shape[1])


@cache
def even_lengths(low: int, high: int) -> list[int]:
    """Return the even numbers from `low` to `high` with no prime factor above 7, whose transforms are fast."""
    found = []
    for number in range(low + low % 2, high + 1, 2):
        rest = number
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            found.append(number)
    return found
