"""Says of a crop whether it seems to hold accompaniment beside a voice: logistic regression on levels of its mel bands.

Weights are those of scripts/make_mixture_detector.py. A band plays where no voice is: below its pitch, above its
consonants, and in its pauses. So the quiet, the middle and the loud frames are looked at, mel band by mel band,
relative to the crop's own level.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from singerembed.model.crop_classifier import CropClassifier, grouped
from singerembed.model.mel import Pcm
from singerembed.model.spec import ModelSpec

_QUANTILES = (0.05, 0.5, 0.95)  # of a band's frames


class MixtureDetector(CropClassifier):
    """Thread-safe."""

    def __init__(self, spec: ModelSpec) -> None:
        """`spec`: of the encoder whose crops are looked at, which `fits`."""
        super().__init__(spec, "mixture.npz", mixture_features)

    def seems_mixed(self, crop: Pcm) -> bool:
        """Whether `crop`, [crop_samples] of int16 or float32, seems to hold accompaniment."""
        return self.score(crop) > 0


def mixture_features(log_mel: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the features of spectrograms, [crops, n_mels, n_frames], log mel power: [crops, 3 n_mels / 4]."""
    levels = np.quantile(log_mel, _QUANTILES, axis=2).transpose(1, 2, 0)  # [crops, n_mels, 3]
    of_groups = grouped(levels).transpose(0, 2, 1)  # [crops, 3, n_mels / 4]
    relative = of_groups - of_groups[:, -1:].mean(axis=2, keepdims=True)
    return np.asarray(relative.reshape(len(relative), -1), np.float32)
