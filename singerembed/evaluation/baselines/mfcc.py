"""Statistics of mel-frequency cepstral coefficients: a baseline without learning."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from singerembed.evaluation.baselines.base import ONLY_LAYER, Crops, ModelFacts
from singerembed.model.mel import MelExtractor
from singerembed.model.spec import ModelSpec

N_COEFFICIENTS = 20
_OFFSET = 1e-10


class MfccModel:
    """Mean and standard deviation over time of 20 coefficients and of their differences: 80 dimensions.

    The coefficients are those of Davis and Mermelstein (1980): the orthonormal DCT-II of the log mel power, without the
    first, which is the level. Cosine similarity needs dimensions of a common scale, so each is scaled to mean 0 and
    deviation 1 over the evaluated crops (`embed.standardised`).
    """

    batch = 16
    workers = 1

    def __init__(self, name: str, crop_samples: int = ModelSpec.crop_samples) -> None:
        spec = ModelSpec(
            name="mfcc", method="mfcc", crop_samples=crop_samples, mel_sample_rate=44_100, mel_fmax=16_000.0
        )
        self._mel = MelExtractor(spec, -np.inf)
        k, n = np.arange(1, N_COEFFICIENTS + 1)[:, np.newaxis], np.arange(spec.n_mels)[np.newaxis]
        self._dct = np.sqrt(2 / spec.n_mels) * np.cos(np.pi * k * (2 * n + 1) / (2 * spec.n_mels))
        self.facts = ModelFacts(
            name=name,
            sample_rate=spec.sample_rate,
            n_parameters=0,
            description=f"mean and deviation of {N_COEFFICIENTS} coefficients and their differences, standardised",
            standardise=True,
        )

    def embed(self, crops: Crops) -> dict[str, NDArray[np.float32]]:
        """See `Model.embed`."""
        cepstrum = self._dct @ np.log(self._mel.power(crops).mel.astype(np.float64) + _OFFSET)
        tracks = np.concatenate([cepstrum, np.gradient(cepstrum, axis=2)], axis=1)
        return {ONLY_LAYER: np.concatenate([tracks.mean(axis=2), tracks.std(axis=2)], axis=1).astype(np.float32)}

    def close(self) -> None:
        """Do nothing: there is nothing to free."""
