"""Says of a crop whether it seems to hold accompaniment beside a voice: logistic regression on levels of its mel bands.

Weights are those of scripts/make_mixture_detector.py. A band plays where no voice is: below its pitch, above its
consonants, and in its pauses. So the quiet, the middle and the loud frames are looked at, mel band by mel band,
relative to the crop's own level.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from singerembed.model.mel import MelExtractor, Pcm
from singerembed.model.spec import ModelSpec

_MEL_OPTIONS = ("n_mels", "n_fft", "hop_samples", "mel_sample_rate", "mel_fmin", "mel_fmax", "log_offset")
_QUANTILES = (0.05, 0.5, 0.95)  # of a band's frames
_BANDS_A_GROUP = 4


class MixtureDetector:
    """Thread-safe."""

    @staticmethod
    def fits(spec: ModelSpec) -> bool:
        """Whether the mel bands of `spec` are those that the weights are for."""
        usual = ModelSpec(name="", method="")
        return all(getattr(spec, option) == getattr(usual, option) for option in _MEL_OPTIONS)

    def __init__(self, spec: ModelSpec) -> None:
        """`spec`: of the encoder whose crops are looked at, which `fits`."""
        self._mel = MelExtractor(replace(spec, normalise=1.0), -np.inf)
        with (resources.files("singerembed") / "data" / "mixture.npz").open("rb") as file:
            content = np.load(file)
            self._weights, self._bias = content["weights"], float(content["bias"])

    def seems_mixed(self, crop: Pcm) -> bool:
        """Whether `crop`, [crop_samples] of int16 or float32, seems to hold accompaniment."""
        (features,) = mixture_features(self._mel.log_mel(crop[np.newaxis]).mel)
        return bool(features @ self._weights + self._bias > 0)


def mixture_features(log_mel: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the features of spectrograms, [crops, n_mels, n_frames], log mel power: [crops, 3 n_mels / 4]."""
    levels = np.quantile(log_mel, _QUANTILES, axis=2).transpose(1, 0, 2)  # [crops, 3, n_mels]
    grouped = levels.reshape(len(levels), len(_QUANTILES), -1, _BANDS_A_GROUP).mean(axis=3)
    relative = grouped - grouped[:, -1:].mean(axis=2, keepdims=True)
    return np.asarray(relative.reshape(len(relative), -1), np.float32)
